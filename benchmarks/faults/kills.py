"""Killed at any moment, a run loses nothing: SIGKILL at 50 random moments, and after every touch of the disk in a save.

    python benchmarks/faults/kills.py

Half of the 50 are spread over the whole run, half over its saves. The second part kills one save after each of its
fsyncs and renames in turn. Every killed run is resumed, and its logs (wall-clock figures apart) and final weights are
held against those of a run that nobody killed. SIGKILL ends a process and not the machine: what the disk itself keeps
through a power cut is not tested here.
"""

import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import BEGUN, DONE, SPENT, Shared, counting_saves, ended, forked, run, same_end
from outcome import conclude

from dvpo.keeper import Keeper

KILLS, AIMED = 50, 25
SAVE_TO_TOUCH = 4


def started(folder: Path, counts: Shared) -> int:
    def action() -> None:
        counting_saves(counts)
        run(folder)

    return forked(action)


def killed(folder: Path, seconds: float, save: int) -> dict[str, Any] | None:
    """Kill a run so many seconds after the start of a save, 0 being the run itself; None if it had ended by then."""
    counts = Shared(3)
    child = started(folder, counts)
    while counts[BEGUN] < save:
        time.sleep(1e-4)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    if ended(child) != -signal.SIGKILL:
        return None
    return {"saves_done": int(counts[DONE]), "inside_a_save": counts[BEGUN] > counts[DONE]}


def resumed(folder: Path, whole: Path) -> bool:
    return ended(forked(lambda: run(folder))) == 0 and same_end(folder, whole)


def at_random(
    place: Path, whole: Path, run_seconds: float, save_seconds: float, count: int, in_saves: int
) -> list[dict[str, Any]]:
    draws, kills = random.Random(0), []
    while len(kills) < count:
        aimed = len(kills) < in_saves
        moment = draws.uniform(0, save_seconds if aimed else run_seconds)
        folder = place / "killed"
        kill = killed(folder, moment, draws.randint(1, 6) if aimed else 0)
        if kill is not None:
            kills.append({**kill, "equal": resumed(folder, whole)})
            print(len(kills), kills[-1], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return kills


def after_every_touch(place: Path, whole: Path, stride: int) -> list[dict[str, Any]]:
    kills: list[dict[str, Any]] = []
    for number in itertools.count(1, stride):
        folder, said = place / "touched", place / "touch"
        child = forked(lambda folder=folder, number=number, said=said: touching(folder, number, said))
        if ended(child) == 0:
            return kills
        kills.append({"after": said.read_text(), "equal": resumed(folder, whole)})
        print(number, kills[-1], flush=True)
        shutil.rmtree(folder)
    raise AssertionError("a save ends")


def touching(folder: Path, number: int, said: Path) -> None:
    """A run that kills itself after so many fsyncs and renames of one save."""
    touches = itertools.count(1)
    saves = itertools.count(1)
    save = Keeper.save

    def then_die(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def touch(*arguments: Any) -> Any:
            result = call(*arguments)
            if next(touches) == number:
                said.write_text(f"{name} {number}")
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return touch

    def touched(self: Keeper) -> Path | None:
        if next(saves) != SAVE_TO_TOUCH:
            return save(self)
        before = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
        for name in before:
            setattr(os, name, then_die(name))
        try:
            return save(self)
        finally:
            for name, call in before.items():
                setattr(os, name, call)

    Keeper.save = touched  # type: ignore[method-assign]
    run(folder)


def measure(place: Path, count: int = 50, in_saves: int = 25, stride: int = 1) -> tuple[bool, dict[str, Any]]:
    """Whether no kill had a consequence, and the figures; only each `stride`-th touch of the save is tried."""
    run(place / "warm")  # what is imported and made on first use is not made in every child
    whole, counts, start = place / "whole", Shared(3), time.monotonic()
    assert ended(started(whole, counts)) == 0
    run_seconds, save_seconds = time.monotonic() - start, counts[SPENT] / counts[DONE]
    kills = at_random(place, whole, run_seconds, save_seconds, count, in_saves)
    touches = after_every_touch(place, whole, stride)
    figures = {
        "kills": len(kills),
        "inside_a_save": sum(kill["inside_a_save"] for kill in kills),
        "equal_to_uninterrupted": sum(kill["equal"] for kill in kills),
        "touches_of_a_save": len(touches),
        "touches_equal_to_uninterrupted": sum(kill["equal"] for kill in touches),
        "run_seconds": round(run_seconds, 3),
        "save_seconds": round(save_seconds, 3),
        "each": [_sentence(kill) for kill in kills],
        "each_touch": [f"{kill['after']}: {'equal' if kill['equal'] else 'DIFFERENT'}" for kill in touches],
    }
    return all(kill["equal"] for kill in [*kills, *touches]), figures


def _sentence(kill: dict[str, Any]) -> str:
    where = "inside the next" if kill["inside_a_save"] else "outside"
    return f"{kill['saves_done']} saves done, {where}: {'equal' if kill['equal'] else 'DIFFERENT'}"


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dvpo-kills-") as folder:
        equal, figures = measure(Path(folder))
    conclude("kills", began, equal and figures["inside_a_save"] >= 10, figures)


if __name__ == "__main__":
    main()
