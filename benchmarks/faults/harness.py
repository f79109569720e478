"""Tiny runs in forked processes: how they are started, watched, interrupted and compared.

Importing torch takes seconds and a tiny run less than one, so every run is a fork of one warm process that has done
nothing but the imports. The models, the task and the comparison of two ended runs are those of the tests.
"""

import mmap
import os
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outcome  # noqa: F401  one thread, since threads do not survive a fork; and the tests' tiny runs

from dvpo.errors import InputError
from dvpo.interrupt import Interrupted, handled
from dvpo.keeper import Keeper
from dvpo.trainer import Trainer
from runs import Parity, assert_equal, run_config

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
    "sampling.resample_rounds=1",
    "actor.kl.coef=0.05",
    "actor.kl.target=0.01",
    "actor.kl.horizon=100",
    "noise.kind=flip",
    "noise.rate=0.3",
    "reward.trusted=0.5",
    "policy_optimiser.schedule=cosine",
    "log.completions=6",
]
"""A run with every kind of state: warm-up, replay, dynamic sampling, a steered KL coefficient, noise, estimated rates,
schedules."""


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
            # As the command line would say it, whatever the parent does with its warnings (pytest keeps them).
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: os.write(2, f"{message}\n".encode())
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

    def on_rewards(self, step: int, faults: object, answers: int) -> None: ...

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None: ...
