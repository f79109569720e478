"""A small study of a user with own code, and its rows."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo.study_results import FIELDS
from runs import SETTINGS, model_folder

ROOT = Path(__file__).resolve().parents[1]

OWN = """
import dataclasses, os, signal
from dvpo.algorithms import ALGORITHMS
from dvpo.tasks import Example
from runs import Parity

class Wide(Parity):
    def split(self, name):
        count = {"train": 16, "id": 8, "ood": 4}.get(name, 0)
        return [Example(f"{name} {i}", [{"role": "user", "content": f"{name} {i * i}"}]) for i in range(count)]

def make_task(settings):
    return Wide()

def fail(signals, config):
    if not os.path.exists("tomorrow"):
        raise RuntimeError("no estimate today")
    return ALGORITHMS["ppo"].estimate(signals, config)

def die(signals, config):
    os.kill(os.getpid(), signal.SIGKILL)

failing = dataclasses.replace(ALGORITHMS["ppo"], name="failing", estimate=fail)
dying = dataclasses.replace(ALGORITHMS["ppo"], name="dying", estimate=die)
"""


def study_values(**changes: Any) -> dict[str, Any]:
    base = {
        **SETTINGS,
        "model": {"path": model_folder()},
        "steps": 3,
        "evaluation": {"every": 1, "prompts": 8},
        "checkpoint": {"every": 1},
    }
    return {
        "output": "out",
        "config": base,
        "tasks": {"parity": {"name": "own:make_task"}},
        "noises": {"clean": {}, "flip": {"kind": "flip", "rate": 0.4}},
        "algorithms": ["dvpo", "ppo", {"name": "reinforce", "algorithm": "own_algorithm:reinforce"}],
        "seeds": [101, 102],
        **changes,
    }


def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user with own code."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def write(place: Path, **changes: Any) -> str:
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(study_values(**changes), sort_keys=False))
    return str(path)


def a_row(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(FIELDS) | {"task": "parity", "noise": "clean", "algorithm": "dvpo", "seed": 101}
    return row | {"config_hash": "0" * 12, "curve": [[0, 0.5, None], [3, 0.5, None]], "id_true": 0.5} | changes
