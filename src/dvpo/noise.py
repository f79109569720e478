"""Noise injected into rewards (section 8 of the method page): a keyed hash, never a stateful generator.

Whether a label is wrong is a pure function of the seed and of what is judged. So the noise is the same
whatever the batch size, the order of the samples, the number of processes, and on both sides of a resumed
checkpoint. For the same seed the labels that are wrong at rate .1 are among those that are wrong at .3, so
that a study over rates is paired.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dvpo.errors import InputError
from dvpo.seeding import derive_uniform
from dvpo.tasks import Reward


class Noise(Protocol):
    """Turns true rewards into observed ones; all arguments hold one entry a sample."""

    def __call__(
        self,
        true_rewards: Sequence[Reward],
        prompt_ids: Sequence[str],
        visits: Sequence[int],
        sample_indices: Sequence[int],
    ) -> list[Reward]:
        """`visits` counts the earlier draws of the prompt, `sample_indices` the samples of this one."""
        ...


_KEYS: dict[str, Callable[[str, int, int], tuple[str | int, ...] | None]] = {
    "none": lambda prompt_id, visit, sample_index: None,
    "flip": lambda prompt_id, visit, sample_index: (prompt_id, visit, sample_index),
    "persistent": lambda prompt_id, visit, sample_index: (prompt_id,),
}
"""What the correctness of a label depends on, for each kind of noise."""


def make_noise(kind: str, rate: float, seed: int, low: float = 0.0, high: float = 1.0) -> Noise:
    """The noise model of that name: r -> low + high - r wherever the label is wrong, and r elsewhere.

    `none` leaves every reward as it is, whatever the rate. `flip` makes each label wrong with probability
    `rate`, independently, keyed by (seed, prompt id, visit, sample index). `persistent` makes every label of
    a prompt wrong for a share `rate` of the prompts, keyed by (seed, prompt id).

    A missing reward stays missing. In a list (a reward a turn or a token) the last entry is the verdict on the
    response and is treated like a scalar; the others stay, since most of them are zeros that judge nothing and
    turning each would add rewards in proportion to the length.

    Args:
        kind: `none`, `flip` or `persistent`.
        rate: the probability, or the share, of wrong labels, in [0, 1].
        seed: another seed, other wrong labels.
        low: the lowest reward, in the reward's units.
        high: the highest reward; a binary reward is one of the two.

    Returns:
        `noise(true_rewards, prompt_ids, visits, sample_indices)` -> observed rewards.

    Raises:
        InputError: an unknown kind, a rate outside [0, 1], bounds in the wrong order; when called, a reward
            outside the bounds.
    """
    if kind not in _KEYS:
        near = difflib.get_close_matches(str(kind), _KEYS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_KEYS)}"
        raise InputError(f"noise.kind: there is no noise {kind!r}; {hint}")
    if not _is_number(rate) or not 0 <= rate <= 1:
        raise InputError(f"noise.rate: {rate!r} is no probability; give a number from 0 to 1")
    if not (_is_number(low) and _is_number(high) and low < high):
        raise InputError(
            f"noise.low, noise.high: {low!r} and {high!r} bound no reward; give two numbers, the lower first"
        )
    return _Reflection(kind, rate, seed, low, high)


@dataclass(frozen=True)
class _Reflection:
    """Mirrors wrong labels at the middle of the bounds: 0 and 1 trade places."""

    kind: str
    rate: float
    seed: int
    low: float
    high: float

    def __call__(
        self,
        true_rewards: Sequence[Reward],
        prompt_ids: Sequence[str],
        visits: Sequence[int],
        sample_indices: Sequence[int],
    ) -> list[Reward]:
        labels = zip(true_rewards, prompt_ids, visits, sample_indices, strict=True)
        return [self._observed(reward, prompt, int(visit), int(index)) for reward, prompt, visit, index in labels]

    def _observed(self, reward: Reward, prompt_id: str, visit: int, index: int) -> Reward:
        if isinstance(reward, list):
            verdict = [self._label(last, prompt_id, visit, index) for last in reward[-1:]]
            return [_none_if_nan(entry) for entry in reward[:-1]] + verdict
        return self._label(reward, prompt_id, visit, index)

    def _label(self, reward: float | None, prompt_id: str, visit: int, index: int) -> float | None:
        reward, key = _none_if_nan(reward), _KEYS[self.kind](prompt_id, visit, index)
        if reward is None or key is None:
            return reward
        if not self.low <= reward <= self.high:
            raise InputError(
                f"noise.low, noise.high: the reward {reward} of prompt {prompt_id!r} is outside [{self.low}, "
                f"{self.high}]; set them to the bounds of the reward"
            )
        wrong = derive_uniform("noise", self.kind, self.seed, *key) < self.rate
        return self.low + self.high - reward if wrong else reward


def _none_if_nan(reward: float | None) -> float | None:
    return None if reward is None or math.isnan(reward) else reward


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
