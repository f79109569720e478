"""A reward function that misbehaves in every way for a fifth of its samples or calls: the run ends well, and counts.

    python benchmarks/faults/rewards.py

A run a manner, on a tiny model. Which samples are bad, a hash of their text says: to the function, and to this script,
which reads them back from completions.jsonl. Faults in metrics.jsonl, rows of faults.jsonl and missing rewards must be
exactly these, and the run must come to its last step.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misbehaving import is_bad, misbehaving
from outcome import conclude

from dvpo.faults import KINDS
from dvpo.runlog import read_rows
from dvpo.trainer import Trainer
from runs import Parity, run_config

STEPS, RESPONSES = 25, 8
SETTINGS = [
    f"sampling.prompts_per_step={RESPONSES // 2}",
    "sampling.samples_per_prompt=2",
    f"log.completions={RESPONSES}",
    "algorithm=reinforce_pp",
    "evaluation.prompts=1",
    "reward.workers=4",
]
"""Four workers with two responses each: three time-outs in a row, after which the rest of a part is not tried, do not
happen."""
HANGS = ("reward.timeout=0.75",)


@dataclass(frozen=True)
class Manner:
    """A way to misbehave, and what is to come of it."""

    name: str
    kind: str | None
    """Of its faults; None: no fault, but an abstention or nothing at all."""
    of_calls: bool = False
    """A fifth of the calls is bad as a whole, not of the samples."""
    missing: bool = True
    """The bad ones have no reward in the end."""
    settings: tuple[str, ...] = ()


MANNERS = (
    Manner("raises", "exception"),
    Manner("sys.exit", "exception"),
    Manner("None", None),
    Manner("NaN", None),
    Manner("+inf", "non_finite"),
    Manner("-inf", "non_finite"),
    Manner("text for a number", "wrong_type"),
    Manner("list of 99 for a response", "wrong_length"),
    Manner("sleeps", "timeout", settings=HANGS),
    Manner("spins in C", "timeout", settings=HANGS),
    Manner("os._exit", "worker_died"),
    Manner("segmentation fault", "worker_died"),
    Manner("prints 20 MB", None, missing=False),
    Manner("returns 2 MB", "output_flood"),
    Manner("one entry too few", "wrong_length", of_calls=True),
    Manner("None for the list", "wrong_type", of_calls=True),
    Manner("async raises", "exception", settings=("reward.concurrency=2",)),
    Manner("async sleeps", "timeout", settings=("reward.concurrency=2", *HANGS)),
    Manner("raises the first time", "exception", missing=False, settings=("reward.workers=1", "reward.retries=2")),
)


def expected(manner: Manner, rows: Sequence[dict[str, Any]]) -> list[tuple[int, str, int]]:
    """The bad samples of a run, each by step, prompt and number; a bad call is all samples of one worker's part."""
    if not manner.of_calls:
        bad = [row for row in rows if is_bad(row["completion"])]
    else:
        together = sorted(rows, key=place)  # a worker's part is a prompt's two
        calls = [together[start : start + 2] for start in range(0, len(together), 2)]
        bad = [row for call in calls if is_bad(*(row["completion"] for row in call)) for row in call]
    return sorted(map(place, bad))


def place(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["step"], row["prompt_id"], row["sample"]


def run(manner: Manner, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """One run; what was injected, what was counted, and whether they are the same."""
    config = run_config(folder, *SETTINGS, *manner.settings, f"steps={steps}")
    began = time.monotonic()
    trainer = Trainer(config, task=Parity(), reward=misbehaving(manner.name))
    trainer.train()
    metrics = [row for row in read_rows(folder / "metrics.jsonl") if "reward/faults" in row]
    faults = [row for row in read_rows(folder / "faults.jsonl") if row["kind"] != "alarm"]
    injected = expected(manner, list(read_rows(folder / "completions.jsonl")))
    counted = {kind: int(sum(row[f"reward/faults_{kind}"] for row in metrics)) for kind in KINDS}
    in_faults = injected if manner.kind else []
    cured = len(in_faults) if not manner.missing else 0
    exact = (
        trainer.step == steps == len(metrics)
        and counted == {kind: len(in_faults) * (kind == manner.kind) for kind in KINDS}
        and sorted(map(place, faults)) == in_faults
        and all(row["kind"] == manner.kind for row in faults)
        and sum(row["reward/cured"] for row in metrics) == cured
        and round(sum(row["reward/missing"] for row in metrics) * RESPONSES) == len(injected) * manner.missing
        and all(row["reward/observed"] == 1.0 for row in metrics if row["reward/missing"] < 1)
    )
    return {
        "manner": manner.name,
        "responses": steps * RESPONSES,
        "injected": len(injected),
        "faults": {kind: count for kind, count in counted.items() if count},
        "cured": cured,
        "seconds": round(time.monotonic() - began, 1),
        "exact": exact,
    }


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(manner, Path(folder) / str(number)) for number, manner in enumerate(MANNERS)]
    conclude("rewards", began, all(row["exact"] for row in rows), {"steps": STEPS, "runs": rows})


if __name__ == "__main__":
    main()
