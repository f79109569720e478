"""A study: a grid of task x noise x algorithm x seed, one run a cell, written down in one YAML file.

    output: runs/my_study
    config: {steps: 100}                        # what all runs share, nested as in a run's config
    tasks: {math: {}}                           # name -> `task` section, whose own `name` is this one unless given
    noises: {clean: {}, flip: {kind: flip, rate: 0.4}}         # name -> `noise` section
    algorithms: [dvpo, ppo, {name: dvpo_m8, algorithm: dvpo, overrides: {critic: {num_quantiles: 8}}}]
    seeds: [101, 102, 103]                      # the same for every algorithm, so that runs are paired

A noise's `tasks: {task: {...}}` are sections that take its place for single tasks. An entry's `overrides` are further
settings, nested as in a run's config; the algorithm's win over the noise's, these over the task's, these over `config`.
`like: noise.yaml` takes from the file of that name beside this one what is not said here: `config` is laid over the
other's, a plain name of `algorithms` is the other's entry of that name. `like: ppo` in an entry takes the overrides of
that entry, here or there, and its own are on top. Every cell's config is made and validated before anything runs.
"""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from dvpo.config import Config, to_plain
from dvpo.errors import InputError
from dvpo.kinds import RUN_KEYS, refuse_config
from dvpo.loading import load_config
from dvpo.nested import merge, read_yaml
from dvpo.provenance import config_hash
from dvpo.settings_learning import CheckpointConfig, LogConfig

KEYS = ("output", "config", "tasks", "noises", "algorithms", "seeds")
ENTRY_KEYS = ("name", "algorithm", "overrides", "like")
SET_BY_GRID = ("seed", "algorithm", "output")
"""Settings of a run that are the cell's own."""
LATER = ("by",)
"""Settings of a list's entries (`noise.then`) that are younger than rows which have been hashed."""

CellKey = tuple[str, str, str, int]
"""(task, noise, algorithm, seed): the first fields of a results row."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    task: str
    noise: str
    algorithm: str
    seed: int
    config: Config
    config_hash: str
    """Tells apart what has a say in the result: where and how often a run is saved and logged has none."""

    @property
    def key(self) -> CellKey:
        return self.task, self.noise, self.algorithm, self.seed

    @property
    def id(self) -> str:
        """The name of the run's folder, and of the cell on the screen."""
        return cell_id(self.key)

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


@dataclass(frozen=True)
class Study:
    """The cells of a study in the order in which they are run: whole blocks of one seed, so that what is there of an
    unfinished study is balanced."""

    output: Path
    cells: tuple[Cell, ...]

    @property
    def results(self) -> Path:
        """Where the rows go unless another file is named."""
        return self.output / "results.jsonl"

    @property
    def places(self) -> list[tuple[str, str]]:
        """(task, noise) of its cells, each once, in the file's order."""
        return list(dict.fromkeys((cell.task, cell.noise) for cell in self.cells))

    def names(self, axis: str) -> list[Any]:
        """The values that cells have on an axis, each once, in the file's order."""
        return list(dict.fromkeys(getattr(cell, axis) for cell in self.cells))


def load_study(path: str | Path, overrides: Sequence[str] = (), only: str | None = None) -> Study:
    """Read and validate a study.

    Args:
        path: the YAML file, as the module says.
        overrides: `key.sub=value` settings of every run, stronger than the file; `output=...` is the study's.
        only: `axis=value` pairs joined by commas; a cell is taken if it has one of the values named of each axis.

    Raises:
        InputError: anything wrong with the file, or with the config of any cell.
    """
    values = read_study(path)
    output, overrides = _own_output(values["output"], overrides, path)
    base = _settings(values.get("config"), f"study {path}: config")
    tasks = _sections(values["tasks"], "task", f"study {path}: tasks")
    tasks = {name: merged({"task": {"name": name}}, settings) for name, settings in tasks.items()}
    noises, apart = _noises(values["noises"], list(tasks), f"study {path}: noises")
    algorithms = _algorithms(values["algorithms"], f"study {path}: algorithms")
    chosen = _selection(only, {"task": [*tasks], "noise": [*noises], "algorithm": [*algorithms],
                               "seed": _seeds(values["seeds"], f"study {path}: seeds")})  # fmt: skip
    cells = [
        _make_cell(
            (task, noise, algorithm, seed),
            merged(base, tasks[task], apart.get((noise, task), noises[noise]), algorithms[algorithm]),
            overrides,
            output,
            path,
        )
        for seed in chosen["seed"]
        for task in chosen["task"]
        for noise in chosen["noise"]
        for algorithm in chosen["algorithm"]
    ]
    if len({cell.id for cell in cells}) < len(cells):
        raise InputError(f"study {path}: two cells would share a folder, for names are joined by `-`: rename one")
    return Study(output, tuple(cells))


def cell_id(key: CellKey) -> str:
    """`math-flip-dvpo-101`; a colon, as in `my_module:my_row`, becomes a point."""
    return "-".join(map(str, key)).replace(":", ".")


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings laid over each other, the last one on top."""
    return reduce(merge, parts, {})


def result_hash(config: Config) -> str:
    """Twelve hex digits that tell apart the configs of two runs whose results may differ.

    They are of what differs from the settings' own defaults: one that is added later leaves a study's rows valid.
    """
    whole = replace(config, output="", checkpoint=CheckpointConfig(), log=LogConfig())
    return config_hash(json.dumps(_unlike(to_plain(whole), to_plain(Config())), sort_keys=True))


def _unlike(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values that are not the defaults."""
    return {
        key: _unlike(value, defaults[key])
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
        else _as_hashed(value)
        for key, value in values.items()
        if key not in defaults or value != defaults[key]
    }


def _as_hashed(value: Any) -> Any:
    """The entries of a list are hashed whole, but for what newer versions have added to them and nobody set."""
    if not isinstance(value, list):
        return value
    return [
        {name: v for name, v in entry.items() if name not in LATER or v is not None}
        if isinstance(entry, dict)
        else entry
        for entry in value
    ]


def _make_cell(
    key: CellKey, values: Mapping[str, Any], overrides: Sequence[str], output: Path, path: str | Path
) -> Cell:
    folder = output / "runs" / cell_id(key)
    try:
        config = load_config({**values, "seed": key[-1], "output": str(folder)}, overrides)
    except InputError as error:
        raise InputError(f"study {path}, cell {cell_id(key)}: {error}") from None
    return Cell(*key, config=config, config_hash=result_hash(config))


# What stands in the file


def read_study(path: str | Path) -> dict[str, Any]:
    """What stands in a study's file, each `like` in it replaced by what it names.

    Raises:
        InputError: no readable study, a run's config, a key that is missing or unknown, or a `like` that names nothing.
    """
    values, where = _read(path), f"study {path}"
    _check_keys(values, (*KEYS, "like"), where, "config")
    named: dict[str, dict[str, Any]] = {}
    if "like" in values:
        other = _other(values.pop("like"), path)
        configs = [_settings(part.get("config"), f"{where}: config") for part in (other, values)]
        if "algorithms" in other:
            named = {entry["name"]: entry for entry in _entries(other["algorithms"], {}, f"{where}: like: algorithms")}
        values = {**other, **values, "config": merged(*configs)}
    missing = [key for key in KEYS if key not in values and key != "config"]
    if missing:
        raise InputError(f"{where} has no `{missing[0]}`: a study names {', '.join(KEYS)}")
    return {**values, "algorithms": _entries(values["algorithms"], named, f"{where}: algorithms")}


def _read(path: str | Path) -> dict[str, Any]:
    values = read_yaml(path, "study")
    refuse_config(path, values)
    return values


def _other(name: Any, path: str | Path) -> dict[str, Any]:
    """The study that `path` is like."""
    if not isinstance(name, str):
        raise InputError(f"study {path}: like = {name!r} is no file's name: write for example like: noise.yaml")
    other = Path(path).parent / name
    values = _read(other)
    if "like" in values:
        raise InputError(f"study {path}: like = {name!r}, which is like {values['like']!r}: name that one")
    _check_keys(values, KEYS, f"study {other}", "config")
    return values


def _entries(values: Any, named: Mapping[str, dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The list as `{name, algorithm, overrides}`; what a name or a `like` means stands in `named` or further up."""
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} = {values!r} must be a list of at least one name, such as [dvpo, ppo]")
    found, entries = dict(named), []
    for value in values:
        entry = {"name": value}
        if isinstance(value, Mapping):
            entry = dict(value)
        elif isinstance(value, str):
            entry = dict(found.get(value, entry))
        _check_keys(entry, ENTRY_KEYS, where, "overrides")
        name = _checked_name(entry.get("name"), where)
        own = _settings(entry.get("overrides"), f"{where}: {name}: overrides")
        if "like" in entry:
            model = entry.pop("like")
            if not isinstance(model, str) or model not in found:
                raise InputError(f"{where}: {name}: like = {model!r}: {_nearest(str(model), found)}")
            own = merged(found[model].get("overrides") or {}, own)
        entries.append({"name": name, "algorithm": entry.get("algorithm", name), "overrides": own})
        found[name] = entries[-1]
    return entries


def _own_output(output: Any, overrides: Sequence[str], path: str | Path) -> tuple[Path, list[str]]:
    """The study's folder, and the overrides that are meant for the runs."""
    left = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "output":
            output = value
        elif key in SET_BY_GRID:
            raise InputError(
                f"override {override!r}: {key} is an axis of the study; pick cells by --only {key}=..., "
                f"or change `{key}s` in {path}"
            )
        else:
            left.append(override)
    if not isinstance(output, str) or not output:
        raise InputError(f"study {path}: output = {output!r} is no folder: write for example output: runs/my_study")
    return Path(output), left


def _settings(values: Any, where: str) -> dict[str, Any]:
    """A nested piece of a run's config, without what the grid sets."""
    if not isinstance(values, Mapping | None):
        raise InputError(f"{where} = {values!r} is a section: write `key: value` lines below it")
    own = [key for key in SET_BY_GRID if key in (values or {})]
    if own:
        raise InputError(f"{where}: {own[0]} is set by the study itself: remove it there")
    return dict(values or {})


def _sections(values: Any, section: str, where: str) -> dict[str, dict[str, Any]]:
    """Name -> settings, from name -> that section of a config with `overrides` in it."""
    if not isinstance(values, Mapping) or not values:
        such = "tasks: {math: {}}" if where.endswith("tasks") else "noises: {clean: {}}"
        raise InputError(f"{where} = {values!r} must be a mapping of at least one name, such as {such}")
    found = {}
    for name, entry in values.items():
        here = f"{where}: {_checked_name(name, where)}"
        if not isinstance(entry, Mapping | None):
            raise InputError(f"{here} = {entry!r} is no section: write {{}} or the settings of `{section}`")
        own = dict(entry or {})
        overrides = _settings(own.pop("overrides", None), f"{here}: overrides")
        found[name] = merged({section: own}, overrides)
    return found


def _noises(
    values: Any, tasks: list[str], where: str
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], dict[str, Any]]]:
    """Name -> settings, and (name, task) -> the settings that stand in for these where an entry's `tasks` says so."""
    apart: dict[tuple[str, str], dict[str, Any]] = {}
    if isinstance(values, Mapping):
        values = dict(values)
        for name, entry in values.items():
            if isinstance(entry, Mapping) and "tasks" in entry:
                here = f"{where}: {name}: tasks"
                own = _sections(entry["tasks"], "noise", here)
                _check_keys(own, tasks, here)
                apart |= {(name, task): settings for task, settings in own.items()}
                values[name] = {key: value for key, value in entry.items() if key != "tasks"}
    return _sections(values, "noise", where), apart


def _algorithms(entries: Sequence[Mapping[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """Name -> settings."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["name"] in found:
            raise InputError(
                f"{where} names {entry['name']} twice: give one of them another name, and its row as `algorithm`"
            )
        found[entry["name"]] = {**entry["overrides"], "algorithm": entry["algorithm"]}
    return found


def _seeds(values: Any, where: str) -> list[int]:
    whole = isinstance(values, list) and all(type(seed) is int and seed >= 0 for seed in values)
    if not whole or not values or len(set(values)) < len(values):
        raise InputError(f"{where} = {values!r} must be a list of different whole numbers from 0, such as [101, 102]")
    return values


def _checked_name(name: Any, where: str) -> str:
    """A name that may stand in a folder's name and in --only."""
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_.:-" for c in name):
        raise InputError(f"{where}: the name {name!r} must be a text of letters, digits and _ . : - (quote it)")
    return name


def _check_keys(values: Mapping[Any, Any], known: Collection[str], where: str, below: str = "") -> None:
    """`below`: the key under which a run's settings stand here; what is an axis of the grid is none of them."""
    for key in values:
        if key not in known:
            setting = below and key in RUN_KEYS and key not in SET_BY_GRID and f"{key}s" not in known
            remedy = f"put it under `{below}:`" if setting else _nearest(str(key), known)
            raise InputError(f"{where}: unknown key {key}: {remedy}")


def _nearest(word: str, known: Iterable[Any]) -> str:
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]}?" if near else "there are " + ", ".join(names)


def _selection(only: str | None, axes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The values of each axis that `--only` leaves."""
    wanted: dict[str, list[str]] = {axis: [] for axis in axes}
    for pair in filter(None, (only or "").split(",")):
        axis, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or axis not in axes:
            raise InputError(f"--only {pair}: {_nearest(axis, axes)} (write axis=value, for example noise=flip)")
        if value not in map(str, axes[axis]):
            raise InputError(f"--only {pair}: the study has no such {axis}: {_nearest(value, axes[axis])}")
        wanted[axis].append(value)
    return {axis: [v for v in values if not wanted[axis] or str(v) in wanted[axis]] for axis, values in axes.items()}
