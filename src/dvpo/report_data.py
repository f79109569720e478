"""What a report is made of: run folders, or a study's rows and whichever of its run folders are there.

A `Place` is what is compared: series of runs (an algorithm, several seeds) under one task and noise.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dvpo.config import to_plain
from dvpo.errors import InputError
from dvpo.nested import flat
from dvpo.runlog import TIME_PREFIX, is_evaluation, read_rows
from dvpo.study import Cell, Study
from dvpo.study_results import Row, split_accuracy

NO_SAY = ("seed", "output", "device", "log.", "checkpoint.", "evaluation.")
"""Settings in which the runs of one series may differ."""
WHERE = ("task.", "noise.", "model.", "reward.")
"""Settings that say under what an algorithm was tried, and not which algorithm it was."""


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it; of a bare results row only the evaluations are known."""

    name: str
    """The series it belongs to."""
    seed: int
    folder: Path | None
    settings: Mapping[str, Any]
    """Dotted key -> value, as in config.yaml."""
    steps: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    completions: Sequence[Row] = ()
    tokens: Sequence[Row] = ()
    faults: Sequence[Row] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    """Task and noise in a study."""

    @property
    def label(self) -> str:
        """The name of this run among all of the page."""
        return ", ".join(filter(None, (self.place, self.name, f"seed {self.seed}")))

    @property
    def seconds(self) -> float:
        return sum(row.get(f"{TIME_PREFIX}step") or 0.0 for row in self.steps)

    @property
    def reward_faults(self) -> list[Row]:
        """What was survived; an alarm stands in the same file and is none."""
        return [row for row in self.faults if row.get("kind") != "alarm"]

    @property
    def alarms(self) -> dict[str, Row]:
        """Name of an alarm -> the row of its first ringing."""
        rows = [row for row in self.faults if row.get("kind") == "alarm"]
        return {str(row.get("alarm")): row for row in reversed(rows)}

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a figure, steps at which it is not defined left out."""
        rows = self.evaluations if key.startswith("eval/") else self.steps
        return [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Run]
    colour: int = 0
    """Its number in the legend."""


@dataclass(frozen=True)
class Place:
    """What may be compared: one task, one noise."""

    title: str
    series: Sequence[Series]
    task: str = ""
    """By the name that a study gives it."""

    @property
    def runs(self) -> list[Run]:
        return [run for series in self.series for run in series.runs]


def read_run(folder: Path, name: str = "", place: str = "") -> Run:
    """Read a run folder; `name` defaults to its algorithm.

    Raises:
        InputError: it holds no run, or a damaged one.
    """
    try:
        settings = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        raise InputError(
            f"{folder} holds no run (config.yaml or manifest.json cannot be read): give a run folder or a study's YAML"
        ) from None
    metrics = _rows(folder, "metrics.jsonl")
    evaluations = [_with_means(row) for row in metrics if is_evaluation(row)]
    return Run(
        name=name or str(settings.get("algorithm")),
        seed=int(settings.get("seed", 0)),
        folder=folder,
        settings=settings,
        steps=[row for row in metrics if not is_evaluation(row)],
        evaluations=evaluations,
        completions=_rows(folder, "completions.jsonl"),
        tokens=_rows(folder, "tokens.jsonl"),
        faults=_rows(folder, "faults.jsonl"),
        manifest=manifest,
        place=place,
    )


def place_of_runs(folders: Iterable[Path]) -> Place:
    """Runs side by side: those whose settings differ in nothing but the seed are one series.

    Raises:
        InputError: a folder holds no run, or stands there twice.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs if run.folder}) < len(runs):
        raise InputError("a run folder is named twice: give each once")
    groups: dict[tuple[str, int], list[Run]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for run in runs:
        identity = json.dumps(_identity(run), sort_keys=True)
        # A seed that was run again, by other code or on another machine, is no further seed.
        groups.setdefault((identity, times[identity, run.seed]), []).append(run)
        times[identity, run.seed] += 1
    names = series_names([group[0] for group in groups.values()])
    series = [
        Series(name, [replace(run, name=name) for run in group], colour)
        for colour, (name, group) in enumerate(zip(names, groups.values(), strict=True))
    ]
    return Place("", series)


def places_of_study(study: Study, rows: Sequence[Row]) -> list[Place]:
    """A place for each task and noise of a study; cells without a row are left out.

    Raises:
        InputError: no cell has a row.
    """
    found = {(row["task"], row["noise"], row["algorithm"], row["seed"]): row for row in rows}
    places = []
    for task, noise in study.places:
        title = f"{task}, {noise}"
        series: dict[str, list[Run]] = {}
        for cell in study.cells:
            if (cell.task, cell.noise) == (task, noise) and cell.key in found:
                run = _of_cell(cell, found[cell.key], title)
                series.setdefault(cell.algorithm, []).append(run)
        if series:
            there = [(colour, name) for colour, name in enumerate(study.names("algorithm")) if name in series]
            places.append(Place(title, [Series(name, series[name], colour) for colour, name in there], task))
    if not places:
        raise InputError("the results file holds no row of this study's cells: run the study first")
    return places


def _of_cell(cell: Cell, row: Row, place: str) -> Run:
    """The run of a cell from its folder, or what its row says of it."""
    if (cell.folder / "manifest.json").exists():
        return read_run(cell.folder, cell.algorithm, place)
    evaluations = [
        {"step": step, "eval/id/accuracy": at_id, "eval/ood/accuracy": at_ood} for step, at_id, at_ood in row["curve"]
    ]
    manifest = {"commit": row["commit"], "config_hash": row["config_hash"], "machine": {"cpu": row["machine"]}}
    settings = flat(to_plain(cell.config))
    return Run(cell.algorithm, cell.seed, None, settings, evaluations=evaluations, manifest=manifest, place=place)


def _rows(folder: Path, name: str) -> list[Row]:
    path = folder / name
    return list(read_rows(path)) if path.exists() else []


def _with_means(evaluation: Row) -> Row:
    """An evaluation of several tasks with the means over them, by which it can stand beside others."""
    means = {f"eval/{split}/accuracy": split_accuracy(evaluation, split) for split in ("id", "ood")}
    return {name: mean for name, mean in means.items() if mean is not None} | evaluation


def _identity(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if not key.startswith(NO_SAY)}


def series_names(runs: Sequence[Run]) -> list[str]:
    """The algorithm's name, with the settings that tell it apart from the other series: no name stands twice."""
    names: list[str] = []
    for run in runs:
        mine, keys = _identity(run), set()
        for other in runs:
            theirs = _identity(other)
            shared = other.name == run.name
            keys |= {key for key in mine if mine[key] != theirs.get(key) and (shared or key.startswith(WHERE))}
        names.append(", ".join([run.name, *(f"{key}={mine[key]}" for key in _telling(keys, runs))]))
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


def _telling(keys: Collection[str], runs: Sequence[Run]) -> list[str]:
    """Of the keys in which a run differs from others three, those with the most values first."""
    values = {key: len({str(_identity(run).get(key)) for run in runs}) for key in keys}
    return sorted(sorted(keys, key=lambda key: (-values[key], key))[:3])
