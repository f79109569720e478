"""SIGTERM in each phase of a run: a sound checkpoint within the stated time, and a resume that ends the same.

    python benchmarks/faults/signals.py

The run signals itself at a chosen moment: in the middle of a response being sampled, in a reward function that would
hang for a minute, in an update of the critic alone, between two minibatches of the policy's update, in an evaluation,
in a save. Measured is the time from the signal to the end of the process. It is to be at most one update and one save,
as an uninterrupted run shows them, and a second for everything else.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import DONE, SPENT, Shared, counting_saves, ended, forked, run, same_end
from outcome import conclude

from dvpo.checkpoint import Checkpointer, checkpoint_step, latest_checkpoint
from dvpo.interrupt import RESUMABLE
from dvpo.runlog import read_rows
from dvpo.sampling import HuggingFaceSampler
from dvpo.trainer import Trainer

SLACK_SECONDS = 1.0
HANG_SECONDS = 60.0
SETTINGS = ["checkpoint.every=4", "evaluation.samples=0", f"reward.timeout={HANG_SECONDS}"]


def signal_once(marker: Path, process: int) -> bool:
    """Signal the run, unless it was signalled before; the marker holds the time."""
    if marker.exists():
        return False
    marker.write_text(str(time.monotonic()))
    os.kill(process, signal.SIGTERM)
    return True


def hanging_reward(marker: Path) -> Callable[..., list[float]]:
    """The truth; but in its second call the run is signalled, and the call hangs."""
    calls: list[int] = []

    def parity(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2 and signal_once(marker, os.getppid()):
            time.sleep(HANG_SECONDS)
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]

    return parity


def signalling(kind: type, method: str, call: int, marker: Path, greedy: bool | None = None) -> None:
    """Have this process signal itself when a method is called for the `call`-th time (by a greedy sampler, or not)."""
    original, calls = getattr(kind, method), []

    def signalled(self: Any, *arguments: Any) -> Any:
        if greedy is None or self.greedy == greedy:
            calls.append(1)
            if len(calls) == call:
                signal_once(marker, os.getpid())
        return original(self, *arguments)

    setattr(kind, method, signalled)


# A step draws up to 12 tokens, and so does an evaluation of each of the two splits.
PHASES: dict[str, tuple[Any, ...]] = {
    "sampling": (HuggingFaceSampler, "_choose", 30, False),
    "reward scoring": (),
    "critic warm-up": (Trainer, "_update_critic", 2),
    "update": (Trainer, "_update_actor", 2),
    "evaluation": (HuggingFaceSampler, "_choose", 30, True),
    "save": (Checkpointer, "_publish", 1),
}


def interrupted(place: Path, phase: str, whole: Path) -> dict[str, Any]:
    """Signal a run in a phase, look at what it leaves, resume it."""
    folder, marker = place / "run", place / "signalled"
    rewards = {"reward": hanging_reward(marker)} if phase == "reward scoring" else {}

    def first() -> None:
        if PHASES[phase]:
            kind, method, call, *greedy = PHASES[phase]
            signalling(kind, method, call, marker, *greedy)
        run(folder, *SETTINGS, **rewards)

    code = ended(forked(first))
    seconds = time.monotonic() - float(marker.read_text())
    checkpoint = latest_checkpoint(folder)
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
    again = ended(forked(lambda: run(folder, *SETTINGS, **rewards)))
    outcome = {
        "phase": phase,
        "seconds": round(seconds, 3),
        "exit_code": code,
        "checkpoint": checkpoint and checkpoint.name,
        "no_step_lost": checkpoint is not None and checkpoint_step(checkpoint) == max(steps),
        "equal": again == 0 and same_end(folder, whole),
    }
    shutil.rmtree(folder)
    marker.unlink()
    return outcome


def measure(place: Path) -> tuple[bool, dict[str, Any]]:
    """Whether every phase can be interrupted in time and without a consequence, and the figures."""
    whole, counts = place / "whole", Shared(3)

    def counted() -> None:
        counting_saves(counts)
        run(whole, *SETTINGS)

    run(place / "warm", *SETTINGS)
    assert ended(forked(counted)) == 0
    update = max(row.get("time/update", 0.0) for row in read_rows(whole / "metrics.jsonl"))
    save = counts[SPENT] / counts[DONE]
    limit = update + save + SLACK_SECONDS
    rows = []
    for phase in PHASES:
        rows.append(interrupted(place, phase, whole))
        print(rows[-1], flush=True)
    fine = [
        row["exit_code"] == RESUMABLE and row["seconds"] <= limit and row["no_step_lost"] and row["equal"]
        for row in rows
    ]
    seconds = {"update_seconds": update, "save_seconds": save, "limit_seconds": limit}
    return all(fine), {**{name: round(value, 3) for name, value in seconds.items()}, "each": rows}


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dvpo-signals-") as folder:
        passed, figures = measure(Path(folder))
    conclude("signals", began, passed, figures)


if __name__ == "__main__":
    main()
