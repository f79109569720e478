"""Noise injected into rewards (docs/noise.md): a keyed hash, never a stateful generator.

What the noise does is a pure function of the seed and of what is judged. So it is the same whatever the batch size,
the order of the samples, the number of processes, and on both sides of a resumed checkpoint. For the same seed the
labels that are wrong at rate .1 are among those that are wrong at .3, so that a study over rates is paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.jsonl import json_objects
from dvpo.noise_models import MODELS, PARAMETERS, Draw, Model
from dvpo.seeding import derive_seed
from dvpo.settings import NoiseConfig
from dvpo.tasks import Example, Reward

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class KeyedModel:
    """A model with its stream of draws."""

    kind: str
    model: Model
    seed: int
    shared: Mapping[str, str] = field(default_factory=dict)
    """Prompt id -> what it shares its draws with; a prompt that is not there has its own."""

    def observed(
        self, reward: Reward, prompt_id: str, visit: int, sample_index: int, response: Sequence[int]
    ) -> Reward:
        """A missing entry stays missing; the last entry of a list is its verdict."""
        judged: dict[str, tuple[int, ...]] = {
            "sample": (int(visit), int(sample_index)),
            "prompt": (),
            "response": tuple(map(int, response)),
        }
        whose = self.shared.get(prompt_id, prompt_id)
        draw = Draw(("noise", self.kind, self.seed, whose, *judged[self.model.per]))
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


def make_noise(settings: NoiseConfig, seed: int, train: Sequence[Example] | None = None) -> Noise:
    """The noise that a config's `noise` section describes.

    Args:
        settings: the first model, and under `then` those that follow.
        seed: of the run, for every model without its own. A model's place in the list enters its key, so two models
            of one kind are independent.
        train: the training examples; pseudo-labels are checked against them, and columns that `by` names are read.

    Raises:
        InputError: pseudo-labels that cannot be read, or do not belong to the training examples; a column that one of
            these does not have; `by` without them.
    """
    models = []
    for place, step in enumerate((settings, *settings.then)):
        if step.kind in MODELS:
            own_seed = _seed_of_place(seed if step.seed is None else step.seed, place)
            shared = {} if step.by is None else _values_of(step.by, train)
            models.append(KeyedModel(step.kind, _model(step), own_seed, shared))
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


def _values_of(column: str, train: Sequence[Example] | None) -> dict[str, str]:
    """Prompt id -> its value in a column."""
    if train is None:
        raise InputError(f"noise.by = {column} is a column of the training examples: give make_noise(..., train=) them")
    for example in train:
        if column not in example.columns:
            raise InputError(
                f"noise.by = {column} is no column of the training example {example.id!r}, which has "
                f"{', '.join(example.columns) or 'none'}: name one that all examples have"
            )
    return {example.id: str(example.columns[column]) for example in train}


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
