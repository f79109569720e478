"""How often a binary reward is wrong: estimated on prompts whose truth is known, or known to the user."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvpo.config import Config
from dvpo.core.masks import Reduce
from dvpo.distributed import is_main
from dvpo.errors import InputError
from dvpo.seeding import derive_uniform
from dvpo.shaping import NO_RATES, Rates
from dvpo.stats import wilson_interval
from dvpo.tasks import Example, Task

ENOUGH = 20
"""Responses of each kind, truly right and truly wrong, without which both rates count as 0."""
MOST = 0.8
"""Rates that add up to more are scaled down to it, so that no reward is multiplied by more than 5."""


@dataclass(frozen=True)
class Tally:
    """Judgements that could go wrong in one way, and how many did."""

    wrong: int = 0
    seen: int = 0

    @property
    def rate(self) -> float:
        """The posterior mean under Jeffreys' prior Beta(1/2, 1/2): (wrong + 1/2) / (seen + 1)."""
        return (self.wrong + 0.5) / (self.seen + 1)

    def plus(self, wrong: int, seen: int) -> "Tally":
        return Tally(self.wrong + wrong, self.seen + seen)


class RateEstimator:
    """Counts, over a run, how often the observed reward of a response to a trusted prompt differs from the true one.

        p = P(observed 1 | true 0),   q = P(observed 0 | true 1)

    It sees observed and true rewards of trusted prompts, where both are 0 or 1, and nothing else. Once one is observed
    that is neither, nothing is estimated any more: those that are 0 or 1 would be chosen by what is to be counted. The
    trusted prompts are those with the smallest keyed hash: the same for every algorithm, and those of a small share are
    among those of a larger one. Training itself uses their observed reward, as anybody's.

    Args:
        examples: the training prompts.
        share: of them that is trusted, rounded up.
        seed: of the run.
    """

    def __init__(self, examples: Iterable[Example], share: float, seed: int) -> None:
        ids = sorted({e.id for e in examples}, key=lambda name: derive_uniform("trusted", seed, name))
        self.trusted = frozenset(ids[: math.ceil(share * len(ids))])
        self.false_positives, self.false_negatives = Tally(), Tally()
        self.binary = True
        """No other observed reward than 0 and 1 so far."""

    def observe(self, prompt_ids: Sequence[str], observed_B: Tensor, true_B: Tensor, reduce: Reduce) -> None:
        """Count the responses of a step.

        Args:
            prompt_ids: of each response.
            observed_B: observed return, NaN where missing.
            true_B: true return, NaN where unknown.
            reduce: sums over processes.
        """
        trusted_B = torch.tensor([i in self.trusted for i in prompt_ids], dtype=torch.bool, device=observed_B.device)
        observed_B, true_B = observed_B[trusted_B], true_B[trusted_B]
        graded_B = observed_B.isfinite() & ~is_binary(observed_B)
        counts = reduce(torch.cat([count_false(observed_B, true_B), graded_B.sum(dim=0, keepdim=True)]))
        false_positives, wrong, false_negatives, right_ones, graded = map(int, counts)
        if graded and self.binary:
            self.binary, self.false_positives, self.false_negatives = False, Tally(), Tally()
            if is_main():
                warnings.warn(
                    f"reward.trusted: {graded} of the rewards observed in a step are neither 0 nor 1, so false "
                    "verdicts cannot be counted: from here on no rate is estimated and nothing is corrected; give "
                    "reward.rates, or take a reward of 0 and 1. Said once",
                    stacklevel=2,
                )
        if not self.binary:
            return
        self.false_positives = self.false_positives.plus(false_positives, wrong)
        self.false_negatives = self.false_negatives.plus(false_negatives, right_ones)

    def rates(self) -> Rates:
        """What a correction may use: no rates while one of them is but a guess, rates of a bounded sum afterwards."""
        if min(self.false_positives.seen, self.false_negatives.seen) < ENOUGH:
            return NO_RATES
        p, q = self.false_positives.rate, self.false_negatives.rate
        shrink = min(1.0, MOST / (p + q))
        return Rates(p * shrink, q * shrink)

    def figures(self) -> dict[str, float]:
        """The estimates with their 95% Wilson intervals, over how many responses, and the factor of a correction."""
        figures: dict[str, float] = {}
        for name, tally in (("false_positive", self.false_positives), ("false_negative", self.false_negatives)):
            low, high = wilson_interval(tally.wrong, tally.seen)
            figures |= {f"noise/{name}": tally.rate, f"noise/{name}_low": low, f"noise/{name}_high": high}
        return figures | {
            "noise/trusted": float(self.false_positives.seen + self.false_negatives.seen),
            "noise/correction": 1 / (1 - sum(self.rates())),
        }

    def state_dict(self) -> dict[str, Any]:
        tallies = {"false_positives": self.false_positives, "false_negatives": self.false_negatives}
        return {name: [tally.wrong, tally.seen] for name, tally in tallies.items()} | {"binary": self.binary}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.false_positives = Tally(*state["false_positives"])
        self.false_negatives = Tally(*state["false_negatives"])
        self.binary = state.get("binary", True)  # older checkpoints do not say


class KnownRates:
    """Rates that the user gives: nothing is counted, and nothing is held back.

    Args:
        rates: p and q, p + q < 1.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates

    def observe(self, prompt_ids: Sequence[str], observed_B: Tensor, true_B: Tensor, reduce: Reduce) -> None:
        """Look away."""

    def rates(self) -> Rates:
        return self._rates

    def figures(self) -> dict[str, float]:
        """The factor of a correction."""
        return {"noise/correction": 1 / (1 - sum(self._rates))}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The config has it all."""


def open_rates(config: Config, task: Task, examples: Iterable[Example]) -> RateEstimator | KnownRates | None:
    """The estimator that `reward.trusted` asks for, or the rates in `reward.rates`; None where there is neither.

    Raises:
        InputError: the task knows no truth to estimate from.
    """
    share, known = config.reward.trusted, config.reward.rates
    if known.given:
        return KnownRates(Rates(known.false_positive or 0.0, known.false_negative or 0.0))
    if not share:
        return None
    if not getattr(task, "knows_truth", True):
        raise InputError(
            f"reward.trusted = {share:g} needs true rewards, which the task {task.name} does not know: "
            "name a function for them (task.truth, with your own files), or set it to 0 and correct nothing"
        )
    return RateEstimator(examples, share, config.seed)


def count_false(observed_B: Tensor, true_B: Tensor) -> Tensor:
    """False positives, wrong responses, false negatives, right responses, where both returns are 0 or 1: [4]."""
    counted_B = is_binary(observed_B) & is_binary(true_B)
    said, right = observed_B[counted_B] > 0.5, true_B[counted_B] > 0.5
    return torch.stack([(said & ~right).sum(), (~right).sum(), (~said & right).sum(), right.sum()])


def is_binary(rewards_B: Tensor) -> Tensor:
    """Which returns are 0 or 1; NaN is neither."""
    return (rewards_B.abs() < 1e-6) | ((rewards_B - 1).abs() < 1e-6)
