"""Prompts as token ids: the chat template, and the lengths that settings and the model's context allow."""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dvpo.errors import InputError
from dvpo.settings import SamplingConfig
from dvpo.tasks import Example, Message, Prompt


class ChatEncoder:
    """Prompts and environment turns as token ids, through the tokenizer's chat template."""

    MARK = "\x02dvpo\x03"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any] = {}) -> None:
        self.tokenizer, self.template = tokenizer, template

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a string as it stands, or of a message list up to where the assistant's next word belongs."""
        if isinstance(prompt, str):
            return string_ids(self.tokenizer, prompt)
        # What the assistant has begun to say is neither closed nor begun anew.
        return self.plain(self._render(prompt, bool(prompt) and prompt[-1].get("role") == "assistant"))

    def reply(self, messages: Sequence[Message], last_token: int) -> list[int]:
        """Token ids of what the environment says, between the policy's last token and its next turn.

        The sampled ids are never decoded and encoded again: the template is rendered around a mark in place of the
        policy's words, and only what follows the mark is tokenised (less the end token that the policy wrote itself,
        which need not be the tokenizer's eos_token: a generation config may name others).
        """
        if self.tokenizer.chat_template is None:
            return self.plain("".join(m["content"] for m in messages))
        dummy = [{"role": "user", "content": "?"}, {"role": "assistant", "content": self.MARK}]
        _, mark, tail = self._render([*dummy, *messages]).rpartition(self.MARK)
        if not mark:
            raise InputError("model.path: the chat template does not show the assistant's words: use another template")
        special = self.tokenizer.added_tokens_decoder.get(last_token)
        if special is not None and tail.lstrip().startswith(special.content):
            tail = tail.lstrip().removeprefix(special.content)
        return self.plain(tail)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Message], goes_on: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise InputError(
                "task: a prompt is a message list, but the tokenizer of model.path has no chat template: "
                "give prompts as strings, or add chat_template.jinja to the model folder"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages],
                    tokenize=False,
                    add_generation_prompt=not goes_on,
                    continue_final_message=goes_on,
                    **self.template,
                )
            )
        except Exception as error:  # templates raise whatever they like
            mend = "its roles, or the assistant's message at its end" if goes_on else "its roles"
            mend += ", or model.template" if self.template else ""
            reason = next(iter(str(error).splitlines()), type(error).__name__)  # more lines may quote the whole prompt
            raise InputError(f"task: the chat template refuses a prompt ({reason}): mend {mend}") from None

    def plain(self, text: str) -> list[int]:
        """Token ids of a text as it stands: no special token is added, those of a template stand in it already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def string_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as the tokenizer begins one, without a second begin token where it has one already."""
    first = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (first and text.startswith(first)))["input_ids"])


def _lengths_that_fit(settings: SamplingConfig, longest: int, context_length: int) -> str:
    """Settings to copy, with room for prompts twice as long as the longest where half of the context has it."""
    prompt = max(longest, min(8 * math.ceil(longest / 4), context_length // 2))
    if longest < 1 or prompt >= context_length:
        return "shorten the prompts, leave long ones out by sampling.long_prompts=skip, or take another model"
    completion = min(settings.max_completion_length, context_length - prompt)
    return f"set for example sampling.max_prompt_length={prompt} sampling.max_completion_length={completion}"


def within_context(settings: SamplingConfig, context_length: int) -> SamplingConfig:
    """The settings with prompts no longer than what a completion leaves of the model's context.

    Raises:
        InputError: it leaves nothing.
    """
    room = context_length - settings.max_completion_length
    if room < 1:
        raise InputError(
            f"sampling.max_completion_length = {settings.max_completion_length} fills the model's context of "
            f"{context_length} tokens: lower it"
        )
    return replace(settings, max_prompt_length=min(settings.max_prompt_length, room))


def fit_prompts(
    examples: Sequence[Example],
    encoder: ChatEncoder,
    settings: SamplingConfig,
    context_length: int,
    split: str = "train",
) -> dict[str, Sequence[int]]:
    """Encode every prompt and apply the stated policy for over-long ones.

    Returns:
        Prompt id -> token ids, four bytes each; prompts that `long_prompts: skip` leaves out are absent.

    Raises:
        InputError: an over-long or empty prompt, or lengths that exceed the model's context.
    """
    limit = settings.max_prompt_length
    if limit + settings.max_completion_length > context_length:
        longest = max((len(encoder.prompt(e.prompt)) for e in examples), default=0)
        limit = min(limit, context_length - settings.max_completion_length)
        if limit < 1 or (longest > limit and settings.long_prompts == "error"):
            raise InputError(
                f"sampling: max_prompt_length = {settings.max_prompt_length} and max_completion_length = "
                f"{settings.max_completion_length} exceed the model's context of {context_length} tokens "
                f"(longest prompt: {longest}): {_lengths_that_fit(settings, longest, context_length)}"
            )
    encoded: dict[str, Sequence[int]] = {}
    for example in examples:
        tokens = encoder.prompt(example.prompt)
        if not tokens:
            raise InputError(f"task: prompt {example.id} is empty: remove it")
        if len(tokens) > limit:
            if settings.long_prompts == "error":
                raise InputError(
                    f"task: prompt {example.id} has {len(tokens)} tokens, more than sampling.max_prompt_length = "
                    f"{limit}: raise it, or set sampling.long_prompts to skip or truncate"
                )
            if settings.long_prompts == "skip":
                continue
            tokens = tokens[-limit:]
        encoded[example.id] = array("i", tokens)
    if not encoded:
        bound = f"sampling.max_prompt_length = {limit}: raise it"
        if limit < settings.max_prompt_length:
            bound = (
                f"the {limit} tokens that sampling.max_completion_length = {settings.max_completion_length} leaves of "
                f"the model's context of {context_length}: lower it"
            )
        raise InputError(f"task: no prompt of {split} fits {bound}")
    return encoded
