"""Does it learn? Without noise, every row of the table against its own start.

    make learns        # dvpo and ppo: 2 dials x 5 seeds; every other row: 3 seeds; 60 steps a run, two at a time

Writes results/learns.json and the result block of every page below docs/algorithms. The seeds were fixed before the
first run and serve nothing else; exploration used seed 0.
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
from dvpo.algorithms import ALGORITHMS

SEEDS = (101, 102, 103, 104, 105)
BOTH_DIALS = ("dvpo", "ppo")
FEW_SEEDS = SEEDS[:3]
STEPS = 60
GAIN = 0.05
"""What counts as learning on one seed: so much true ID accuracy gained."""
RESULT = Path(__file__).parent / "results" / "learns.json"
PAGES = Path(__file__).parents[1] / "docs" / "algorithms"
BEGIN, END = "<!-- learns: written by make learns -->", "<!-- /learns -->"

Row = dict[str, Any]


def grid() -> list[tuple[str, float, int]]:
    """(algorithm, checker dial, seed) of every run."""
    full = [(name, dial, seed) for name in BOTH_DIALS for dial in (0.0, 1.0) for seed in SEEDS]
    return full + [(name, 1.0, seed) for name in ALGORITHMS if name not in BOTH_DIALS for seed in FEW_SEEDS]


def run(algorithm: str, checker: float, seed: int) -> Row:
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
    row: Row = {"algorithm": algorithm, "checker": checker, "seed": seed, "steps": STEPS}
    for when, step in (("before", 0), ("true", STEPS)):
        row |= {f"{split}_{when}": evaluations[step][f"eval/{split}/accuracy"] for split in ("id", "ood")}
    return row | {"seconds": round(time.perf_counter() - started, 1), "commit": provenance.source().commit}


def cells(rows: list[Row]) -> dict[tuple[str, float], list[Row]]:
    """(algorithm, dial) -> its runs, in the order of the grid."""
    grouped: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["algorithm"], row["checker"]), []).append(row)
    return grouped


def learnt(runs: list[Row]) -> int:
    """On how many of its seeds an algorithm gained at least `GAIN`."""
    return sum(row["id_true"] - row["id_before"] >= GAIN for row in runs)


HEADER = ("algorithm", "checker dial", "ID before", "ID after", "OOD before", "OOD after", "seeds that gained")


def line(name: str, dial: float, runs: list[Row]) -> tuple[str, ...]:
    """One row of a table: means over seeds in %, with the range where there is one."""
    spreads = (_spread([r[f"{split}_{when}"] for r in runs]) for split in ("id", "ood") for when in ("before", "true"))
    return (name, f"{dial:g}", *spreads, f"{learnt(runs)} of {len(runs)}")


def _spread(values: list[float]) -> str:
    low, mean, high = 100 * min(values), 100 * sum(values) / len(values), 100 * max(values)
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def show(rows: list[Row]) -> None:
    table = Table(title=f"true accuracy (%) without noise, {STEPS} steps, mean over seeds (min to max)")
    for column in HEADER:
        table.add_column(column, justify="right")
    for (name, dial), runs in cells(rows).items():
        table.add_row(*line(name, dial, runs))
    Console(width=130).print(table)


def block(result: Row, name: str) -> str:
    """The result block of an algorithm's page: its own lines and ppo's beside them."""
    mine = {cell: runs for cell, runs in cells(result["rows"]).items() if cell[0] in (name, "ppo")}
    table = [HEADER, ("---",) * len(HEADER), *(line(*cell, runs) for cell, runs in mine.items())]
    text = "\n".join("| " + " | ".join(entries) + " |" for entries in table)
    commits = ", ".join(dict.fromkeys(r["commit"][:7] for runs in mine.values() for r in runs))
    return (
        f"{BEGIN}\nTrue accuracy in % without noise after {STEPS} steps, mean over seeds (min to max), 256 held-out "
        f"prompts of each\nsplit, commit {commits}; it shows that the row learns, and says nothing about "
        f"one row against another.\n\n{text}\n{END}"
    )


def write_pages(result: Row) -> None:
    """Renew the block between the marks in every page that has them."""
    for page in PAGES.glob("*.md"):
        before, mark, rest = page.read_text().partition(BEGIN)
        if mark:
            page.write_text(before + block(result, page.stem) + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--missing", action="store_true", help="keep the runs that the file holds, add the others")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny models on contended threads run ten times slower
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.missing else []
    done = {(r["algorithm"], r["checker"], r["seed"]) for r in rows}
    missing = [cell for cell in grid() if cell not in done]
    if missing:
        with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
            rows += pool.map(run, *zip(*missing, strict=True))
    rows.sort(key=lambda r: grid().index((r["algorithm"], r["checker"], r["seed"])))
    show(rows)
    facts = {"machine": provenance.machine("cpu") | {"threads": 1}, "versions": provenance.versions()}
    result = {**facts, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {arguments.output}")
    if arguments.output == RESULT:
        write_pages(result)


if __name__ == "__main__":
    main()
