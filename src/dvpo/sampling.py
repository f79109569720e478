"""Sampling: episodes between a policy and an environment, with token ids, masks and log-probs as they were drawn.

    play_draws    so many episodes of each prompt, begun and played
    play          episodes of any number of turns, on any `Sampler`
    collate       finished episodes -> a `Rollout`

The Hugging Face sampler below draws every token with a uniform number of its own (keyed by prompt, visit, sample and
turn), so that a row's draw does not depend on the rows beside it, on the batch size or on a resume.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from dvpo.batch import Rollout
from dvpo.decoding import Decoder
from dvpo.encoding import ChatEncoder
from dvpo.environments import EnvironmentFaultError, environment_at, step
from dvpo.errors import InputError
from dvpo.policy import Policy
from dvpo.seeding import derive_seed
from dvpo.settings import SamplingConfig
from dvpo.tasks import Environment, Example, Message, Step, Task


@dataclass(frozen=True)
class Turn:
    """What the policy wrote before it was cut or stopped."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    """False: the length limit cut it."""


class Sampler(Protocol):
    """Draws one turn for each context."""

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        """At most budgets[i] >= 1 tokens after contexts[i], drawn with seeds[i]."""
        ...


@dataclass
class Episode:
    """One conversation in the making, and the record of it."""

    example: Example
    visit: int
    sample: int
    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    """For each response token the index of the policy's turn, -1 for tokens of the environment."""
    logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The response as messages: the policy's and the environment's."""
    turn_rewards: list[float | None] = field(default_factory=list)
    terminated: bool = False
    """It is over, and not by the length limit."""
    fault: str | None = None
    """What the environment raised, which ended it: nobody knows what it is worth."""

    @property
    def text(self) -> str:
        """The policy's own words, all turns."""
        return "\n".join(m["content"] for m in self.messages if m["role"] == "assistant")

    def record(self) -> dict[str, Any]:
        """The sample as logs show it; a conversation of several turns whole as well."""
        return {
            "prompt_id": self.example.id,
            "visit": self.visit,
            "sample": self.sample,
            "prompt": self.example.prompt,
            "completion": self.text,
            "truncated": not self.terminated,
            **self.conversation(),
        }

    def conversation(self) -> dict[str, list[Message]]:
        """`messages`, the policy's and the environment's, where there is more than one."""
        return {"messages": self.messages} if len(self.messages) > 1 else {}


def begin(
    task: Task,
    example: Example,
    visit: int,
    sample: int,
    prompt_tokens: Mapping[str, Sequence[int]],
    encoder: ChatEncoder,
    settings: SamplingConfig,
) -> tuple[Episode, Environment]:
    """An episode before its first turn; its prompt is encoded anew only where the environment changed it.

    Args:
        task: whose environment answers.
        example: where it starts.
        visit, sample: which of the draws of this example it is.
        prompt_tokens: the examples' prompts as `fit_prompts` encoded them, by id.
        encoder, settings: for a prompt that the environment changed.

    Raises:
        InputError: such a prompt is too long, and may not be cut; the environment raised something.
    """
    with environment_at(example):
        environment = task.environment(example)
        prompt = environment.reset()
    if prompt == example.prompt:
        return Episode(example, visit, sample, list(prompt_tokens[example.id])), environment
    tokens, limit = encoder.prompt(prompt), settings.max_prompt_length
    if len(tokens) > limit and settings.long_prompts != "truncate":
        raise InputError(
            f"task: the environment of prompt {example.id} gave a prompt of {len(tokens)} tokens, more than "
            f"sampling.max_prompt_length = {limit}: raise it, or set sampling.long_prompts to truncate"
        )
    return Episode(example, visit, sample, tokens[-limit:]), environment


def play(
    episodes: Sequence[Episode],
    environments: Sequence[Environment],
    sampler: Sampler,
    encoder: ChatEncoder,
    settings: SamplingConfig,
    seed: int,
) -> None:
    """Let the policy and the environments talk until every episode is over; fills the episodes in place."""
    active = list(range(len(episodes)))
    turn = 0
    while active:
        contexts = [episodes[i].prompt_tokens + episodes[i].tokens for i in active]
        budgets = [settings.max_completion_length - len(episodes[i].tokens) for i in active]
        seeds = [derive_seed(seed, e.example.id, e.visit, e.sample, turn) for e in map(episodes.__getitem__, active)]
        going_on = []
        for i, drawn in zip(active, sampler.sample(contexts, budgets, seeds), strict=True):
            if _take_turn(episodes[i], environments[i], drawn, turn, encoder, settings):
                going_on.append(i)
        active = going_on
        turn += 1


def play_draws(
    task: Task,
    draws: Sequence[tuple[Example, int]],
    samples: int,
    prompt_tokens: Mapping[str, Sequence[int]],
    encoder: ChatEncoder,
    sampler: Sampler,
    settings: SamplingConfig,
    seed: int,
) -> tuple[list[Episode], list[Environment]]:
    """`samples` finished episodes of each example, given with its visit: one draw's after the other's; and where they
    took place."""
    begun = [
        begin(task, example, visit, sample, prompt_tokens, encoder, settings)
        for example, visit in draws
        for sample in range(samples)
    ]
    episodes, environments = [episode for episode, _ in begun], [environment for _, environment in begun]
    play(episodes, environments, sampler, encoder, settings, seed)
    return episodes, environments


def _take_turn(
    episode: Episode,
    environment: Environment,
    drawn: Turn,
    turn: int,
    encoder: ChatEncoder,
    settings: SamplingConfig,
) -> bool:
    """Append a sampled turn and the environment's answer; True if the policy is to speak again."""
    episode.tokens += drawn.tokens
    episode.logprobs += drawn.logprobs
    episode.turns += [turn] * len(drawn.tokens)
    text = encoder.text(drawn.tokens)
    for stop in settings.stop:
        text = text.partition(stop)[0]  # its last token may reach beyond it
    episode.messages.append({"role": "assistant", "content": text})
    if not drawn.finished:
        episode.turn_rewards.append(None)
        return False
    try:
        answer = step(environment, episode.example, text)
    except EnvironmentFaultError as error:
        episode.fault, answer = error.said, Step((), None, done=True)
    episode.turn_rewards.append(answer.reward)
    if answer.done:
        episode.terminated = True
        return False
    reply = encoder.reply(answer.messages, drawn.tokens[-1])
    if len(episode.tokens) + len(reply) >= settings.max_completion_length:
        return False  # no room for another word of the policy: the length limit cuts the episode here
    episode.messages.extend(answer.messages)
    episode.tokens += reply
    episode.logprobs += [0.0] * len(reply)
    episode.turns += [-1] * len(reply)
    return True


class HuggingFaceSampler:
    """Batched sampling with a KV cache on any causal language model of transformers.

    Contexts of similar length share a batch, so that little of it is padding; rows that are over are dropped on the
    way. Neither changes a draw.
    """

    going_on_share = 0.75
    """Rows that are over are dropped once no more than this share of the batch goes on: each drop copies the cache."""

    def __init__(self, policy: Policy, settings: SamplingConfig, greedy: bool = False) -> None:
        self.policy, self.settings, self.greedy = policy, settings, greedy
        self._warpers: list[Any] = []
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        size, drawn = self.settings.batch_size, []
        order = self._order(contexts)
        model = self.policy.model
        was_training = model.training
        if was_training:  # gradient checkpointing needs that mode, in which transformers drops the KV cache
            model.eval()
        try:
            # Around all steps: autocast casts the weights once and keeps them until it ends, but not in inference mode.
            plain = self.policy.dtype is torch.float32
            with torch.inference_mode() if plain else torch.no_grad(), self.policy.autocast():
                for start in range(0, len(order), size):
                    rows = order[start : start + size]
                    drawn += self._sample_batch(
                        [contexts[i] for i in rows], [budgets[i] for i in rows], [seeds[i] for i in rows]
                    )
        finally:
            if was_training:
                model.train()
        turns = dict(zip(order, drawn, strict=True))
        return [turns[i] for i in range(len(contexts))]

    def _order(self, contexts: Sequence[Sequence[int]]) -> list[int]:
        return sorted(range(len(contexts)), key=lambda i: len(contexts[i]))

    def _sample_batch(
        self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]
    ) -> list[Turn]:
        device, longest = self.policy.device, max(budgets)
        tokens_BS, attention_BS = (tensor.to(device) for tensor in pad_left(contexts, self.policy.pad_id))
        # float64, like the inverted distribution: a grid of 2^-24 is too coarse for a vocabulary of 150,000.
        uniforms_BT = torch.stack(
            [torch.rand(longest, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        ).to(device)
        budgets_B = torch.tensor(budgets, device=device)
        end_ids_1E = torch.tensor([sorted(self.policy.end_ids)], device=device)

        # The record, in the order of the contexts; `rows` says which of them are still carried along, all of them until
        # some are dropped. What a row that is over goes on to write lies behind its length. No mask is used as an
        # index: on a GPU that would wait for it.
        written_BT = torch.zeros(len(contexts), longest, dtype=torch.long, device=device)
        logprobs_BT = torch.zeros(len(contexts), longest, device=device)
        lengths_B = torch.zeros_like(budgets_B)
        finished_B = torch.zeros(len(contexts), dtype=torch.bool, device=device)
        rows: slice | Tensor = slice(None)
        going_on = torch.ones_like(finished_B)
        decoder = Decoder(self.policy, tokens_BS, attention_BS, longest)
        for t in range(longest):
            chosen, logprobs = self._choose(decoder.logits_BV, uniforms_BT[rows, t])
            written_BT[rows, t], logprobs_BT[rows, t] = chosen, logprobs
            lengths_B[rows] += going_on
            stopped = (chosen.unsqueeze(-1) == end_ids_1E).any(dim=-1)
            if self.settings.stop:
                stopped |= self._at_stop_string(written_BT[rows, : t + 1])
            finished_B[rows] |= going_on & stopped
            going_on = going_on & ~stopped & (t + 1 < budgets_B[rows])
            left = int(going_on.sum())
            if left == 0:
                break
            if left <= self.going_on_share * len(going_on) and decoder.can_select:
                keep = going_on.nonzero().squeeze(-1)
                decoder.select(keep)
                rows = keep if isinstance(rows, slice) else rows[keep]
                chosen, going_on = chosen[keep], going_on[keep]
            decoder.step(chosen, going_on)

        record = zip(written_BT.tolist(), logprobs_BT.tolist(), lengths_B.tolist(), finished_B.tolist(), strict=True)
        return [Turn(tokens[:n], logprobs[:n], finished) for tokens, logprobs, n, finished in record]

    def _choose(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens by inversion of the (truncated) distribution, and their untruncated log-probs."""
        logits_BV = logits_BV / self.settings.temperature
        logprobs_BV = logits_BV.log_softmax(dim=-1)
        if self.greedy:
            chosen_B = logits_BV.argmax(dim=-1)
        else:
            kept_BV = logits_BV
            for warp in self._warpers:
                kept_BV = warp(None, kept_BV)
            # float64: over a vocabulary of 150,000 a float32 sum would lose the rare tokens.
            mass_BV = kept_BV.double().softmax(dim=-1).cumsum(dim=-1)
            level_B1 = uniforms_B.unsqueeze(-1) * mass_BV[:, -1:]
            # The product may round up to the whole mass, once in 2^53 draws.
            chosen_B = torch.searchsorted(mass_BV, level_B1, right=True).squeeze(-1).clamp(max=mass_BV.shape[-1] - 1)
        return chosen_B, logprobs_BV.gather(-1, chosen_B.unsqueeze(-1)).squeeze(-1)

    def _at_stop_string(self, written_BT: Tensor) -> Tensor:
        """Rows whose last token completes a stop string, and may reach beyond it (one token can hold ">" and "\\n").

        A token carries at least one byte, so a short tail of the turn holds every string that its last token completes.
        """
        stop = self.settings.stop
        window = max(len(s.encode()) for s in stop) + 4
        texts = self.policy.tokenizer.batch_decode(written_BT[:, -window:])
        return torch.tensor([any(s in text for s in stop) for text in texts], device=written_BT.device)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack rows of ids with padding in front: (tokens [B, P], attention [B, P] bool)."""
    lengths_B = torch.tensor([len(row) for row in rows])
    width = int(lengths_B.max())
    tokens = torch.tensor([[*[pad_id] * (width - len(row)), *row] for row in rows], dtype=torch.long)
    return tokens, torch.arange(width) >= width - lengths_B.unsqueeze(-1)


def pad_right(rows: Sequence[Sequence[Any]], fill: Any, dtype: torch.dtype, width: int) -> Tensor:
    """Stack rows with `fill` behind them: [B, width]."""
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def collate(episodes: Sequence[Episode], scores: Mapping[str, Tensor], pad_id: int, policy_version: int) -> Rollout:
    """Pad finished and scored episodes into a `Rollout` (on the CPU).

    Args:
        episodes: finished episodes, every one with at least one policy token.
        scores: the fields `rewards_BT`, `rewarded_B`, `observed_B`, `true_B` of the rollout; the first may be wider
            than the longest response.
        pad_id: fills padded places.
        policy_version: optimiser steps that the policy had seen.
    """
    width = max(len(e.tokens) for e in episodes)
    prompts_BP, prompt_attention_BP = pad_left([e.prompt_tokens for e in episodes], pad_id)
    response_BT = pad_right([e.tokens for e in episodes], pad_id, torch.long, width)
    response_attention_BT = pad_right([[True] * len(e.tokens) for e in episodes], False, torch.bool, width)
    turns_BT = pad_right([e.turns for e in episodes], -1, torch.long, width)
    terminated_B = torch.tensor([e.terminated for e in episodes])
    logprobs_BT = pad_right([e.logprobs for e in episodes], 0.0, torch.float32, width)
    return Rollout(
        tokens_BS=torch.cat([prompts_BP, response_BT], dim=1),
        attention_BS=torch.cat([prompt_attention_BP, response_attention_BT], dim=1),
        mask_BT=turns_BT >= 0,
        turns_BT=turns_BT,
        sampler_logprobs_BT=logprobs_BT,
        old_logprobs_BT=logprobs_BT,
        entropies_BT=torch.zeros(len(episodes), width),
        hints_BH=torch.zeros(len(episodes), 0, dtype=torch.long),
        terminated_B=terminated_B,
        truncated_B=~terminated_B,
        rewards_BT=scores["rewards_BT"][:, :width],
        rewarded_B=scores["rewarded_B"],
        observed_B=scores["observed_B"],
        true_B=scores["true_B"],
        prompt_ids=tuple(e.example.id for e in episodes),
        visits=tuple(e.visit for e in episodes),
        samples=tuple(e.sample for e in episodes),
        policy_version=policy_version,
    )
