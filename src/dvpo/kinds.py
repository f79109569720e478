"""Two kinds of YAML file, a run's config and a study: one that is given in place of the other is told apart."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.nested import hints_of

RUN_KEYS = frozenset(hints_of(Config))
STUDY_KEYS = frozenset({"output", "config", "tasks", "noises", "algorithms", "seeds", "like"})


def refuse_study(path: str | Path, values: Mapping[Any, Any]) -> None:
    """Raise InputError if what was read as a run's config is a study."""
    if _rather(values, STUDY_KEYS, RUN_KEYS):
        raise InputError(f"{path} is a study, no run's config: dvpo study {path}")


def refuse_config(path: str | Path, values: Mapping[Any, Any]) -> None:
    """Raise InputError if what was read as a study is a run's config."""
    if _rather(values, RUN_KEYS, STUDY_KEYS):
        output = values.get("output", Config.output)
        raise InputError(
            f"{path} is a run's config, no study: dvpo train {path}, then its report: dvpo report {output}"
        )


def _rather(values: Mapping[Any, Any], other: Set[str], this: Set[str]) -> bool:
    """Whether more of the keys are the other kind's alone than this one's."""
    return len(values.keys() & (other - this)) > len(values.keys() & (this - other))
