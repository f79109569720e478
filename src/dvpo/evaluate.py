"""Evaluation: a policy and a task's split -> one row an item, and a summary with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvpo.config import SamplingConfig
from dvpo.policy import Policy
from dvpo.sampling import ChatEncoder, Episode, HuggingFaceSampler, play
from dvpo.scoring import total
from dvpo.seeding import derive_seed
from dvpo.stats import bootstrap_interval, pass_at_k, wilson_interval
from dvpo.tasks import Example, Reward, Task

Judge = Callable[[Sequence[Episode]], list[Reward]]
CORRECT = 1 - 1e-6
"""A reward from here on counts as a solved item (the verifiers give 0 or 1)."""


@dataclass(frozen=True)
class Evaluation:
    """The result on one split."""

    summary: dict[str, float]
    """`accuracy` (greedy: share solved) with `accuracy_low`, `accuracy_high` (Wilson, 95%), `reward` (greedy mean),
    `truncated`; with k draws `mean@k` and `pass@k`, with bootstrap intervals over prompts."""
    rows: list[dict[str, Any]]
    """One an item: id, prompt, greedy completion and reward, rewards of the draws."""


def evaluate(
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    judge: Judge,
    settings: SamplingConfig,
    samples: int,
    seed: int,
) -> Evaluation:
    """Answer every example greedily and `samples` times at the sampling temperature.

    Args:
        policy: in evaluation mode.
        task: makes the environments.
        examples: the items; none is sampled twice for different items, draws are keyed by (seed, item, draw).
        judge: rewards of finished episodes, None where unknown; an unknown reward counts in no figure.
        settings: lengths, temperature and stops as in training; over-long prompts keep their last tokens.
        samples: k; 0 = greedy only.
        seed: of the draws.
    """
    encoder = ChatEncoder(policy.tokenizer)

    def run(count: int, greedy: bool) -> tuple[list[Episode], np.ndarray]:
        environments, episodes = [], []
        for example in examples:
            for sample in range(count):
                environment = task.environment(example)
                tokens = encoder.prompt(environment.reset())[-settings.max_prompt_length :]
                environments.append(environment)
                episodes.append(Episode(example, visit=0, sample=sample, prompt_tokens=tokens))
        sampler = HuggingFaceSampler(policy, settings, greedy=greedy)
        play(episodes, environments, sampler, encoder, settings, derive_seed(seed, "evaluation"))
        rewards = np.array([total(r) for r in judge(episodes)]).reshape(len(examples), count)
        return episodes, rewards

    greedy, rewards = run(1, greedy=True)
    rows: list[dict[str, Any]] = [
        {"id": e.example.id, "prompt": e.example.prompt, "completion": e.text, "reward": _known(reward)}
        for e, reward in zip(greedy, rewards[:, 0], strict=True)
    ]
    summary = _greedy_summary(greedy, rewards[:, 0])
    if samples:
        drawn = run(samples, greedy=False)[1]
        for row, rewards_of_item in zip(rows, drawn, strict=True):
            row["samples"] = [_known(r) for r in rewards_of_item]
        summary |= _sampled_summary(drawn)
    return Evaluation(summary, rows)


def _greedy_summary(episodes: Sequence[Episode], rewards: np.ndarray) -> dict[str, float]:
    known = rewards[np.isfinite(rewards)]
    solved = int((known >= CORRECT).sum())
    low, high = wilson_interval(solved, len(known))
    return {
        "items": len(known),
        "accuracy": solved / len(known) if len(known) else float("nan"),
        "accuracy_low": low,
        "accuracy_high": high,
        "reward": float(known.mean()) if len(known) else float("nan"),
        "truncated": float(np.mean([not e.terminated for e in episodes])),
    }


def _sampled_summary(rewards: np.ndarray) -> dict[str, float]:
    """mean@k and pass@k over the items all of whose draws have a reward."""
    rewards = rewards[np.isfinite(rewards).all(axis=1)]
    if not len(rewards):
        return {}
    k = rewards.shape[1]
    solved = (rewards >= CORRECT).sum(axis=1)
    summary: dict[str, float] = {}
    for name, scores in (
        (f"mean@{k}", solved / k),
        (f"pass@{k}", np.array([pass_at_k(int(c), k, k) for c in solved])),
    ):
        low, high = bootstrap_interval(lambda rows: float(np.mean(rows[0])), scores)
        summary |= {name: float(scores.mean()), f"{name}_low": low, f"{name}_high": high}
    return summary


def _known(reward: float) -> float | None:
    return float(reward) if np.isfinite(reward) else None
