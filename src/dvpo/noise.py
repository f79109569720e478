"""Noise injected into rewards (docs/noise.md): a keyed hash, never a stateful generator.

What the noise does is a pure function of the seed and of what is judged. So it is the same whatever the batch size,
the order of the samples, the number of processes, and on both sides of a resumed checkpoint. For the same seed the
labels that are wrong at rate .1 are among those that are wrong at .3, so that a study over rates is paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dvpo.errors import InputError
from dvpo.jsonl import json_objects
from dvpo.seeding import derive_seed, derive_uniform
from dvpo.tasks import Example, Reward

if TYPE_CHECKING:
    from dvpo.settings import NoiseConfig

Columns = Mapping[str, Sequence[Any]]
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
"""Every kind of noise and the settings that it takes."""


# Noise of a run


@dataclass(frozen=True)
class KeyedModel:
    """A model with its stream of draws."""

    kind: str
    model: Model
    seed: int

    def observed(
        self, reward: Reward, prompt_id: str, visit: int, sample_index: int, response: Sequence[int]
    ) -> Reward:
        """A missing entry stays missing; the last entry of a list is its verdict."""
        judged: dict[str, tuple[int, ...]] = {
            "sample": (int(visit), int(sample_index)),
            "prompt": (),
            "response": tuple(map(int, response)),
        }
        draw = Draw(("noise", self.kind, self.seed, prompt_id, *judged[self.model.per]))
        if not isinstance(reward, list):
            return reward if reward is None else self.model.verdict(reward, draw)
        earlier = [entry if entry is None else self.model.earlier(entry, draw) for entry in reward[:-1]]
        return earlier + [entry if entry is None else self.model.verdict(entry, draw) for entry in reward[-1:]]


@dataclass(frozen=True)
class Noise:
    """Turns true rewards into observed ones: first other labels to judge by, then models, one after the other."""

    labels: Mapping[str, Any] | None = None
    """Prompt id -> the answer that is taken for the right one; None: the data's own answers."""
    models: tuple[KeyedModel, ...] = ()

    def relabelled(
        self, columns: Mapping[str, Sequence[Any]], prompt_ids: Sequence[str]
    ) -> Mapping[str, Sequence[Any]]:
        """The columns to judge the responses with; the very same ones if this noise has no labels of its own."""
        if self.labels is None:
            return columns
        answers = [self.labels.get(i, own) for i, own in zip(prompt_ids, columns["answer"], strict=True)]
        return {**columns, "answer": answers}

    def __call__(
        self,
        rewards: Sequence[Reward],
        prompt_ids: Sequence[str],
        visits: Sequence[int],
        sample_indices: Sequence[int],
        responses: Sequence[Sequence[int]],
    ) -> list[Reward]:
        """Observed rewards; every argument holds one entry a sample.

        Args:
            rewards: as judged with the relabelled columns. A prompt without a label gives none.
            prompt_ids: stable ids.
            visits: how often the prompt had been drawn before.
            sample_indices: which sample of this draw.
            responses: token ids.
        """
        observed = [
            _missing_as_none(reward) if self.labels is None or prompt_id in self.labels else None
            for reward, prompt_id in zip(rewards, prompt_ids, strict=True)
        ]
        for model in self.models:
            judged = zip(observed, prompt_ids, visits, sample_indices, responses, strict=True)
            observed = [model.observed(*one) for one in judged]
        return observed


NO_NOISE = Noise()


def make_noise(settings: "NoiseConfig", seed: int, train: Sequence[Example] | None = None) -> Noise:
    """The noise that a config's `noise` section describes.

    Args:
        settings: the first model, and under `then` those that follow.
        seed: of the run, for every model without its own. A model's place in the list enters its key, so two models
            of one kind are independent.
        train: the training examples; pseudo-labels are checked against them.

    Raises:
        InputError: pseudo-labels that cannot be read, or do not belong to the training examples.
    """
    models = [
        KeyedModel(step.kind, _model(step), _seed_of_place(seed if step.seed is None else step.seed, place))
        for place, step in enumerate((settings, *settings.then))
        if step.kind in MODELS
    ]
    labels = None
    if settings.kind == "pseudo_labels" and settings.path is not None:
        labels = read_labels(settings.path)
        if train is not None:
            _check_labels(labels, settings.path, train)
    return Noise(labels, tuple(models))


def _model(settings: Any) -> Model:
    return MODELS[settings.kind](**{name: getattr(settings, name) for name in PARAMETERS[settings.kind]})


def _seed_of_place(seed: int, place: int) -> int:
    return derive_seed("noise", seed, place) if place else seed


def _missing_as_none(reward: Reward) -> Reward:
    if isinstance(reward, list):
        return [None if entry is None or math.isnan(entry) else entry for entry in reward]
    return None if reward is None or math.isnan(reward) else reward


def _plus(reward: float, noise: float) -> float:
    """The sum; without noise the reward itself, for -0.0 + 0.0 is not -0.0."""
    return reward + noise if noise else reward


# Pseudo-labels


def read_labels(path: str | Path) -> dict[str, Any]:
    """Prompt id -> answer from a JSONL file of `{"id": ..., "answer": ...}`; an answer of null is no label.

    Raises:
        InputError: an unreadable file, a line that is no such object, an id that stands there twice.
    """
    try:
        rows = list(json_objects(Path(path), "noise.path"))
    except OSError as error:
        raise InputError(f"noise.path = {path} cannot be read ({error.strerror}): check the path") from None
    labels: dict[str, Any] = {}
    for place, row in rows:
        if not (isinstance(row.get("id"), str) and "answer" in row):
            raise InputError(f'noise.path: {place} is no JSON object with "id" (text) and "answer"')
        if row["id"] in labels:
            raise InputError(f"noise.path: {place} labels {row['id']!r} again; keep one line a prompt")
        labels[row["id"]] = row["answer"]
    return {name: answer for name, answer in labels.items() if answer is not None}


def _check_labels(labels: Mapping[str, Any], path: str, train: Sequence[Example]) -> None:
    if not any("answer" in example.columns for example in train):
        raise InputError(
            "noise.kind = pseudo_labels replaces the column `answer`, which no training example has: take another kind"
        )
    if not any(example.id in labels for example in train):
        raise InputError(
            f"noise.path = {path} labels none of the {len(train)} training prompts: make it for this task's prompts"
        )
    kinds = {_kind(example.columns.get("answer")) for example in train} - {"NoneType"}
    for example in train:
        if kinds and example.id in labels and (kind := _kind(labels[example.id])) not in kinds:
            raise InputError(
                f"noise.path = {path} labels {example.id!r} with {labels[example.id]!r}, a {kind}, where the column "
                f"`answer` holds {' and '.join(sorted(kinds))}, which it cannot equal: write labels of that type"
            )


def _kind(answer: Any) -> str:
    """82 equals 82.0, and neither "82" nor True."""
    return "number" if type(answer) in (int, float) else type(answer).__name__
