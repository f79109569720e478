"""What the critics of a study's runs knew, how wide their laws were and how far their heads agreed, from its logs.

    python benchmarks/critic_seen.py configs/studies/noise_best_setting.yaml ...      # where the runs' folders are

Of each task, noise and algorithm with a law: the first step, and the mean over the last fifth of the steps, both
averaged over the seeds whose log is there; the runs' commit and machine are those of their rows. Nothing is trained.
Writes results/critic_seen.json, in which other studies stay as they are; the tables of docs/results.md show it.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from dvpo.runlog import is_evaluation, read_rows
from dvpo.study import Cell, Study, load_study
from dvpo.study_results import late_mean

RESULT = Path(__file__).parent / "results" / "critic_seen.json"
FIGURES = ("true_correlation", "calibration_error", "spread", "head_disagreement", "crossing_share")
"""Of `critic/...` in metrics.jsonl."""

Seen = dict[str, float]
Line = dict[str, str | int | Seen]


def seen(study: Study) -> list[Line]:
    """A line a task, noise and algorithm, in the study's order."""
    runs: dict[tuple[str, str, str], list[tuple[Seen, Seen]]] = {}
    for cell in study.cells:
        if found := of_run(cell):
            runs.setdefault((cell.task, cell.noise, cell.algorithm), []).append(found)
    return [
        {
            **{"task": task, "noise": noise, "algorithm": algorithm, "seeds": len(found)},
            **{when: mean([pair[at] for pair in found]) for at, when in enumerate(("first", "last"))},
        }
        for (task, noise, algorithm), found in runs.items()
    ]


def of_run(cell: Cell) -> tuple[Seen, Seen] | None:
    """The first step and the last ones; None without a log, or where there is no law."""
    path = cell.folder / "metrics.jsonl"
    steps = {row["step"]: row for row in read_rows(path) if not is_evaluation(row)} if path.exists() else {}
    if not steps or "critic/spread" not in steps[min(steps)]:
        return None
    late = {name: late_mean(steps, f"critic/{name}", max(steps)) for name in FIGURES}
    first = {name: steps[min(steps)].get(f"critic/{name}") for name in FIGURES}
    return known(first), known({name: None if value is None else round(value, 4) for name, value in late.items()})


def known(figures: dict[str, float | None]) -> Seen:
    return {name: value for name, value in figures.items() if value is not None}


def mean(rows: list[Seen]) -> Seen:
    """Name by name, of those that have it."""
    found = {name: [row[name] for row in rows if name in row] for name in FIGURES}
    return {name: round(fmean(values), 4) for name, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY.yaml")
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for path in parser.parse_args().studies:
        kept[path.stem] = seen(load_study(path))
        print(f"{path.stem}: {len(kept[path.stem])} lines")
    lines = {study: ",\n".join(f"  {json.dumps(line)}" for line in found) for study, found in kept.items()}
    text = ",\n".join(f' "{study}": [\n{found}\n ]' for study, found in lines.items())
    RESULT.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
