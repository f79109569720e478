"""Does it learn? Without noise, every row of the table against its own start: five seeds, two settings of the dial.

    make learns        # 2 algorithms x 2 dials x 5 seeds of 60 steps, two at a time

The seeds were fixed before the first run and serve nothing else; exploration used seed 0.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dvpo import provenance

SEEDS = (101, 102, 103, 104, 105)
ALGORITHMS = ("dvpo", "ppo")
DIALS = (0.0, 1.0)
STEPS = 60
GAIN, ENOUGH_SEEDS = 0.05, 4
"""What counts as learning: so much true ID accuracy gained, on so many of the seeds."""
RESULT = Path(__file__).parent / "results" / "learns.json"


def run(algorithm: str, checker: float, seed: int) -> dict[str, Any]:
    """One run; true greedy accuracy on 256 held-out prompts of each split, before and after."""
    from dvpo import Trainer, load_config

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            None,
            [
                f"algorithm={algorithm}",
                f"model.checker={checker}",
                f"seed={seed}",
                f"steps={STEPS}",
                f"output={folder}/run",
                "evaluation.prompts=256",
                "checkpoint.every=0",
            ],
        )
        evaluations = Trainer(config).train()
    row: dict[str, Any] = {"algorithm": algorithm, "checker": checker, "seed": seed, "steps": STEPS}
    for when, step in (("before", 0), ("true", STEPS)):
        row |= {f"{split}_{when}": evaluations[step][f"eval/{split}/accuracy"] for split in ("id", "ood")}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def learnt(rows: list[dict[str, Any]], algorithm: str, checker: float) -> int:
    """On how many seeds the algorithm gained at least `GAIN` at that dial."""
    mine = [r for r in rows if (r["algorithm"], r["checker"]) == (algorithm, checker)]
    return sum(r["id_true"] - r["id_before"] >= GAIN for r in mine)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"true accuracy without noise, {STEPS} steps, mean over {len(SEEDS)} seeds (min to max)")
    for column in (
        "algorithm",
        "checker dial",
        "ID before",
        "ID after",
        "OOD before",
        "OOD after",
        "seeds that gained",
    ):
        table.add_column(column, justify="right")
    for checker in DIALS:
        for algorithm in ALGORITHMS:
            mine = [r for r in rows if (r["algorithm"], r["checker"]) == (algorithm, checker)]
            cells = [
                _spread([r[f"{split}_{when}"] for r in mine]) for split in ("id", "ood") for when in ("before", "true")
            ]
            table.add_row(algorithm, f"{checker:g}", *cells, f"{learnt(rows, algorithm, checker)} of {len(mine)}")
    Console(width=120).print(table)


def _spread(values: list[float]) -> str:
    low, mean, high = 100 * min(values), 100 * sum(values) / len(values), 100 * max(values)
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny models on contended threads run ten times slower
    grid = [(algorithm, checker, seed) for seed in SEEDS for checker in DIALS for algorithm in ALGORITHMS]
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(run, *zip(*grid, strict=True)))
    show(rows)
    source = provenance.source()
    facts = {"commit": source.commit, "dirty": source.dirty, "machine": provenance.machine("cpu") | {"threads": 1}}
    arguments.output.write_text(json.dumps({**facts, "versions": provenance.versions(), "rows": rows}, indent=1) + "\n")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
