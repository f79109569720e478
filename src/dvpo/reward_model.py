"""A reward model: a Hugging Face folder that scores a prompt with its completion, and can be named as a reward.

The score is a linear head on the last token's hidden state of a transformer, `AutoModelForSequenceClassification` with
one label, so that reward models made elsewhere are read here, and those made by `dvpo reward-model` elsewhere.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from dvpo.durable import disk_full_named, flush_file, flush_folder
from dvpo.encoding import string_ids
from dvpo.errors import InputError
from dvpo.frozen import hold_frozen
from dvpo.policy import UNREADABLE, compute_type, context_of, first_line, without_dropout
from dvpo.rewards import Fault, Scores
from dvpo.sampling import pad_right
from dvpo.tasks import Completion, Message, Prompt

SCORING_BATCH, SCORING_TOKENS = 64, 1 << 14
"""Sequences, and tokens with their padding, scored side by side: memory only."""


@dataclass(frozen=True)
class RewardModel:
    """A transformer with a scalar head, with its tokenizer; weights that learn are float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype = torch.float32
    """Compute type."""
    field: str = "reward.function"
    """What an InputError names."""

    def encode(self, prompt: Prompt, completion: Completion) -> list[int]:
        """Token ids of the whole conversation by the chat template; two strings are joined and closed by the end token.

        What the assistant has begun in the prompt and its completion are one message. Beyond the model's context the
        last tokens are kept.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            tokens = string_ids(self.tokenizer, prompt + completion)
            end = self.tokenizer.eos_token_id
            tokens += [end] if end is not None and tokens[-1:] != [end] else []
        else:
            said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            if said and answer and said[-1]["role"] == answer[0]["role"] == "assistant":
                whole = {**answer[0], "content": said[-1]["content"] + answer[0]["content"]}
                said, answer = said[:-1], [whole, *answer[1:]]
            tokens = list(self.tokenizer(self._render([*said, *answer]), add_special_tokens=False)["input_ids"])
        return tokens[-context_of(self.model) :]

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """float32 scores [B] of token rows, with gradient; padded on the right, which no score depends on."""
        width = max(len(row) for row in rows)
        pad = self.model.config.get_text_config().pad_token_id
        tokens_BS = pad_right(rows, pad, torch.long, width).to(self.model.device)
        attention_BS = pad_right([[1] * len(row) for row in rows], 0, torch.long, width).to(self.model.device)
        with compute_type(self.dtype, self.model.device):
            return self.model(input_ids=tokens_BS, attention_mask=attention_BS).logits.squeeze(-1).float()

    @torch.no_grad()
    def judge(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The same for any number of rows, in batches of like length and without gradient: float32 [B] on the CPU."""
        scores_B = torch.empty(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            sizes = range(1, min(SCORING_BATCH, len(order)) + 1)
            size = max((n for n in sizes if n * len(rows[order[n - 1]]) <= SCORING_TOKENS), default=1)
            batch, order = order[:size], order[size:]
            scores_B[batch] = self.scores([rows[i] for i in batch]).cpu()
        return scores_B

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write a plain Hugging Face folder, with a record of how it was made beside; it is whole or absent."""
        aside = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
        try:
            with disk_full_named(folder):
                self.model.save_pretrained(aside)
                self.tokenizer.save_pretrained(aside)
                (aside / "reward_model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                for file in aside.iterdir():
                    flush_file(file)
                flush_folder(aside)
                aside.rename(folder)  # replaces an empty folder, and no other
                flush_folder(folder.absolute().parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _render(self, messages: Sequence[Message]) -> str:
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{self.field}: a prompt is a message list, but the reward model's tokenizer has no chat template: "
                "give prompts as strings, or add chat_template.jinja to its folder"
            )
        try:
            return str(self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))
        except Exception as error:  # templates raise whatever they like
            raise InputError(f"{self.field}: the reward model's chat template refuses a prompt ({error})") from None


# Opening


def make_reward_model(source: str | Path, device: torch.device, dtype: str = "float32", seed: int = 0) -> RewardModel:
    """A language model with a fresh scalar head in place of its own, or a reward model to be trained further.

    Raises:
        InputError: no folder or hub name of a model with a tokenizer.
    """
    set_seed(seed)
    return _open(str(source), "--model", device, dtype, learns=True)[0]


def open_reward_model(
    folder: str | Path,
    device: torch.device,
    dtype: str = "float32",
    field: str = "reward.function",
    learns: bool = True,
) -> RewardModel:
    """A finished reward model from a folder.

    Args:
        folder: as `dvpo reward-model` or another tool wrote it.
        device: where it lives.
        dtype: compute type.
        field: what an InputError names.
        learns: False where its weights will not be trained on (`hold_frozen`).

    Raises:
        InputError: no such folder, or no sequence classifier with one label and a trained head in it.
    """
    local = Path(folder).expanduser()
    if not (local / "config.json").is_file():
        raise InputError(f"{field}: {str(folder)!r} holds no model: check the path, or make one by `dvpo reward-model`")
    model, fresh = _open(str(local), field, device, dtype, learns)
    if fresh:
        raise InputError(
            f"{field}: {str(folder)!r} holds a {fresh}, no reward model: train one from it by `dvpo reward-model`"
        )
    return model


def _open(source: str, field: str, device: torch.device, dtype: str, learns: bool) -> tuple[RewardModel, str]:
    """The model, and, if its head is a fresh one, what the folder holds instead of a reward model."""
    try:
        config = without_dropout(AutoConfig.from_pretrained(source, trust_remote_code=False))
        found = (
            f"model with {config.num_labels} labels" if _classifies(config) else " ".join(config.architectures or ["?"])
        )
        config.num_labels = 1
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        with _without_report():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, dtype=torch.float32, trust_remote_code=False,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except UNREADABLE as error:
        raise InputError(
            f"{field}: {source!r} cannot be loaded as a sequence classifier with its tokenizer ({first_line(error)}): "
            "give a folder written by save_pretrained"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{field}: {source!r} has no tokenizer: write one there with tokenizer.save_pretrained")
    # The model reads its score at the last token that is no padding. A tokenizer without a pad token pads by its end
    # token, and the score then stands at the last word before the end, in training and use alike.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None)
    if pad is None:
        raise InputError(f"{field}: {source!r} has neither a pad nor an end token: set pad_token in its tokenizer")
    model.config.get_text_config().pad_token_id = pad
    if not learns:
        hold_frozen(model, getattr(torch, dtype))
    fresh = found if loading["missing_keys"] or loading["mismatched_keys"] else ""
    return RewardModel(model.to(device).eval(), tokenizer, getattr(torch, dtype), field), fresh


def _classifies(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers prints a table when a head is fresh: here that is either meant, or said in a sentence."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# As a reward


class ModelReward:
    """A reward model in the trainer's own process, called as `dvpo.rewards.GuardedReward` is.

    Args:
        model: scores prompt and completion.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores:
        """One score a sample; a score that is not finite is a fault, and the sample has no reward."""
        del completion_ids, columns
        rows = [self.model.encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores = self.model.judge(rows).tolist()
        faults = [Fault("non_finite", i, f"scored {s}") for i, s in enumerate(scores) if not math.isfinite(s)]
        return Scores([s if math.isfinite(s) else None for s in scores], faults)

    def close(self) -> None:
        """There is no process to end."""
