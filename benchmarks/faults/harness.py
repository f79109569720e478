"""What the experiments share: tiny runs in forked processes, how they end, and where the results go.

Importing torch takes seconds and a tiny run less than one, so every run is a fork of one warm process that has done
nothing but the imports. The models, the task and the comparison of two ended runs are those of the tests.
"""

import json
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported; and threads do not survive a fork
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from dvpo import provenance  # noqa: E402
from dvpo.errors import InputError  # noqa: E402
from dvpo.interrupt import Interrupted, handled  # noqa: E402
from dvpo.keeper import Keeper  # noqa: E402
from dvpo.trainer import Trainer  # noqa: E402
from runs import Parity, assert_equal, run_config  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
REFUSED = 2
BEGUN, DONE, SPENT = 0, 1, 2
"""Saves begun and done as a process counts them, and their seconds together."""
SETTINGS = [
    "steps=6",
    "checkpoint.every=1",
    "evaluation.every=3",
    "evaluation.samples=2",
    "update.epochs=2",
    "update.actor_warmup_steps=2",
    "critic.replay=2",
    "noise.kind=flip",
    "noise.rate=0.3",
    "reward.trusted=0.5",
    "policy_optimiser.schedule=cosine",
    "log.completions=6",
]
"""A run with every kind of state: warm-up, replay, noise, estimated rates, schedules."""


def run(folder: Path, *settings: str, **given: Any) -> None:
    """Begin the run in a folder, or go on with it."""
    config = run_config(folder, *SETTINGS, *settings)
    Trainer(config, task=Parity(), resume=(folder / "config.yaml").exists(), **given).train()


def forked(action: Callable[[], object], said: Path | None = None) -> int:
    """Start an action in a child; returns its pid. Its exit code is that of the command line; `said`: its stderr."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if said is not None:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        with handled():
            action()
        code = 0
    except Interrupted as stop:
        stop.resumable = True
        code = stop.exit_code
    except InputError as error:
        os.write(2, f"dvpo: {error}\n".encode())
        code = REFUSED
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same_end(folder: Path, whole: Path) -> bool:
    try:
        assert_equal(folder, whole)
    except (AssertionError, OSError) as error:
        print(f"  {folder.name}: {error!r:.300}")
        return False
    return True


class Shared:
    """Some numbers that a child writes and its parent reads, also after the child was killed."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, 8 * count)

    def __getitem__(self, place: int) -> float:
        return struct.unpack_from("d", self._memory, 8 * place)[0]

    def __setitem__(self, place: int, value: float) -> None:
        struct.pack_into("d", self._memory, 8 * place, value)


def counting_saves(counts: Shared) -> None:
    """Have this process count its saves."""
    save = Keeper.save

    def counted(self: Keeper) -> Path | None:
        start = time.monotonic()
        counts[BEGUN] += 1
        checkpoint = save(self)
        counts[DONE] += 1
        counts[SPENT] += time.monotonic() - start
        return checkpoint

    Keeper.save = counted  # type: ignore[method-assign]


class DiesAt:
    """An observer that kills its own run behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None: ...


def conclude(name: str, began: float, passed: bool, figures: dict[str, Any]) -> None:
    """Write results/faults_<name>.json, show it, and end with exit code 1 if the claim does not hold."""
    source = provenance.source()
    result = {
        "commit": source.commit,
        "machine": provenance.machine("cpu"),
        "versions": provenance.versions(),
        "seconds": round(time.monotonic() - began, 1),
        "passed": passed,
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    text = "{\n" + ",\n".join(f" {json.dumps(key)}: {_as_json(value)}" for key, value in result.items()) + "\n}\n"
    (RESULTS / f"faults_{name}.json").write_text(text)
    print(text)
    sys.exit(not passed)


def _as_json(value: Any) -> str:
    """A table has a line for each row."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)
