"""What noise does to one reward: a class for each kind (docs/noise.md), drawing from a keyed hash."""

import math
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import ClassVar, Literal

from dvpo.seeding import derive_uniform

STANDARD_NORMAL = NormalDist()


# Draws


@dataclass(frozen=True)
class Draw:
    """The random numbers of one judgement. A model that needs several says what each is for."""

    key: tuple[str | int, ...]

    def uniform(self, *purpose: str) -> float:
        """Uniform in [0, 1)."""
        return derive_uniform(*self.key, *purpose)

    def normal(self, *purpose: str) -> float:
        return STANDARD_NORMAL.inv_cdf(max(self.uniform(*purpose), 2.0**-54))  # the quantile of 0 is infinite


# Models


class Model:
    """What becomes of one reward. The fields of a model are the settings that its kind takes under `noise`."""

    per: ClassVar[Literal["sample", "prompt", "response"]] = "sample"
    """What has one draw of its own: a sample (prompt, visit, index), a prompt, or a response text."""

    def verdict(self, reward: float, draw: Draw) -> float | None:
        """The observed reward of a response; in a list of rewards, the observed last entry."""
        raise NotImplementedError

    def earlier(self, reward: float, draw: Draw) -> float:
        """An observed entry before the last. Most are zeros that judge nothing: turning each would add rewards in
        proportion to the length."""
        del draw
        return reward


@dataclass(frozen=True)
class Flip(Model):
    """r -> low + high - r with probability `rate`."""

    rate: float
    low: float
    high: float

    def verdict(self, reward: float, draw: Draw) -> float:
        return self.low + self.high - reward if draw.uniform() < self.rate else reward


@dataclass(frozen=True)
class Persistent(Flip):
    """The same for every response to a share `rate` of the prompts, whenever they are drawn."""

    per = "prompt"


@dataclass(frozen=True)
class Asymmetric(Model):
    """r -> low + high - r with one probability for a wrong response (r at most the middle), another for a right one."""

    false_positive: float
    false_negative: float
    low: float
    high: float

    def verdict(self, reward: float, draw: Draw) -> float:
        right = reward > (self.low + self.high) / 2
        turned = draw.uniform() < (self.false_negative if right else self.false_positive)
        return self.low + self.high - reward if turned else reward


@dataclass(frozen=True)
class RewardModel(Model):
    """r -> r + sigma z, z ~ N(0, 1), sigma such that a right response beats a wrong one with probability `accuracy`.

    The gap of two scores is N(high - low, 2 sigma^2), so accuracy = Phi((high - low) / (sigma sqrt 2)).
    """

    accuracy: float
    low: float
    high: float

    @property
    def sigma(self) -> float:
        if self.accuracy == 1:
            return 0.0
        return (self.high - self.low) / (math.sqrt(2) * STANDARD_NORMAL.inv_cdf(self.accuracy))

    def verdict(self, reward: float, draw: Draw) -> float:
        return _plus(reward, self.sigma * draw.normal())


@dataclass(frozen=True)
class ResponseRewardModel(RewardModel):
    """The same, but the same text always gets the same score: what scores too high can be found and exploited."""

    per = "response"


@dataclass(frozen=True)
class Gaussian(Model):
    """r -> r + sd z, z ~ N(0, 1)."""

    sd: float

    def verdict(self, reward: float, draw: Draw) -> float:
        return _plus(reward, self.sd * draw.normal())


@dataclass(frozen=True)
class StudentT(Model):
    """r -> r + scale t, t ~ Student's t with `df` degrees of freedom: the variance is infinite for df <= 2."""

    df: float
    scale: float

    def verdict(self, reward: float, draw: Draw) -> float:
        # Bailey (1994), Polar generation of random variates with the t-distribution: exact for every df.
        radius = math.sqrt(self.df * ((1 - draw.uniform("radius")) ** (-2 / self.df) - 1))
        return _plus(reward, self.scale * radius * math.cos(2 * math.pi * draw.uniform("angle")))


@dataclass(frozen=True)
class Spikes(Model):
    """r -> r + sd z with probability `rate`, z ~ N(0, 1)."""

    rate: float
    sd: float

    def verdict(self, reward: float, draw: Draw) -> float:
        return _plus(reward, self.sd * draw.normal("size")) if draw.uniform() < self.rate else reward


@dataclass(frozen=True)
class Missing(Model):
    """r -> None with probability `rate`."""

    rate: float

    def verdict(self, reward: float, draw: Draw) -> float | None:
        return None if draw.uniform() < self.rate else reward


@dataclass(frozen=True)
class Random(Model):
    """r -> low or high, a fair coin whatever the response: the control that nothing can be learnt from."""

    low: float
    high: float

    def verdict(self, reward: float, draw: Draw) -> float:
        del reward
        return self.high if draw.uniform() < 0.5 else self.low

    def earlier(self, reward: float, draw: Draw) -> float:
        del reward, draw
        return 0.0  # what stands earlier would tell of the response


@dataclass(frozen=True)
class Affine(Model):
    """r -> offset + scale r, one pair a prompt: offset ~ N(0, offset_sd^2), log scale ~ N(0, scale_sd^2).

    The scale is positive, so the order of the responses to a prompt stays. In a list every entry is scaled and the
    offset lands on the last: the return becomes offset + scale * return.
    """

    per = "prompt"
    offset_sd: float
    scale_sd: float

    def verdict(self, reward: float, draw: Draw) -> float:
        return _plus(self.earlier(reward, draw), self.offset_sd * draw.normal("offset"))

    def earlier(self, reward: float, draw: Draw) -> float:
        return reward * math.exp(self.scale_sd * draw.normal("scale"))


def _plus(reward: float, noise: float) -> float:
    """The sum; without noise the reward itself, for -0.0 + 0.0 is not -0.0."""
    return reward + noise if noise else reward


MODELS: dict[str, type[Model]] = {
    "flip": Flip,
    "persistent": Persistent,
    "asymmetric": Asymmetric,
    "reward_model": RewardModel,
    "response_reward_model": ResponseRewardModel,
    "gaussian": Gaussian,
    "student_t": StudentT,
    "spikes": Spikes,
    "missing": Missing,
    "random": Random,
    "affine": Affine,
}

PARAMETERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "pseudo_labels": ("path",),
    **{kind: tuple(field.name for field in fields(model)) for kind, model in MODELS.items()},  # type: ignore[arg-type]
}
"""Every kind of noise and the settings that it needs."""

OPTIONAL: dict[str, tuple[str, ...]] = {"affine": ("by",)}
"""And those that it may be given."""
