"""What a distribution costs: the training step of every algorithm against PPO's, and DVPO's peak memory.

    make bench        # or: OMP_NUM_THREADS=1 python benchmarks/step.py

A step is all that `Trainer.train_step` does: sampling 64 completions of 32 tokens to 8 prompts of 16 tokens, scoring,
values, advantages, one epoch of the config's minibatches for critic and policy, logs. Own trunks, float32, one thread,
N = 3 heads, M = 200 quantiles. The contestants take turns in one process.

Memory: each algorithm runs three steps in fresh processes of its own; the peak resident size is read at the end, and
what the process held before the first step stands beside it. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from contest import Ratio, circumstances, ratio, show, take_turns, timed
from reference import COMPLETION, GROUP, GROUPS, PROMPT, make_trainer, write_model

from dvpo.algorithms import ALGORITHMS

HERE = Path(__file__).resolve().parent
SIZES = {"reference": (128, 4), "large": (512, 8)}
"""Hidden size and layers."""


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            print(json.dumps(peak_memory(options.memory_of, Path(folder), options.minibatches)))
            return
        result: dict[str, Any] = {
            "sizes": {"prompt": PROMPT, "completion": COMPLETION, "prompts": GROUPS, "samples": GROUP}
            | {name: value for name, value in vars(options).items() if name not in ("output", "memory_of")}
        }
        for size in options.size:
            pairs = options.pairs if size == "reference" else options.large_pairs
            # The paper's row has the same loss, whose seven further terms then have gradients, and the mean of its law.
            names = ["dvpo", *(["dvpo_paper"] if size == "reference" else []), "ppo"]
            for name, row in compare(names, size, pairs, Path(folder), options.minibatches).items():
                result[f"{name}_over_ppo_{size}"] = row
                show(f"{name} / ppo, {size}", row)
        if options.rows:
            others = [name for name in ALGORITHMS if name != "ppo"]
            result["rows_over_ppo"] = compare(
                [*others, "ppo"], "reference", options.rows, Path(folder), options.minibatches
            )
            for name, row in result["rows_over_ppo"].items():
                show(f"{name} / ppo", row)
        if options.processes:
            result["peak_memory"] = memory(options)
            print(f"peak memory of dvpo / ppo {result['peak_memory']['ratio']:.3f}")
    result |= circumstances()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2, default=str) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of turns, after two untimed")
    parser.add_argument("--large-pairs", type=int, default=30, help="the same for the large size: half a minute a pair")
    parser.add_argument("--rows", type=int, default=10, help="timed rounds of all algorithms; 0: none")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes an algorithm for the memory; 0: none")
    parser.add_argument("--minibatches", type=int, default=2, help="optimiser steps a step, of each module")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "step.json")
    parser.add_argument("--memory-of", choices=ALGORITHMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(names: list[str], size: str, rounds: int, folder: Path, minibatches: int) -> dict[str, Ratio]:
    """Every algorithm's ratio to the last one's."""
    model = folder / size
    if not model.exists():
        write_model(model, *SIZES[size])
    trainers = {
        name: make_trainer(name, model, folder / f"{size}-{len(names)}-{name}", f"update.minibatches={minibatches}")
        for name in names
    }
    turns = take_turns({name: timed(trainer.train_step) for name, trainer in trainers.items()}, rounds)
    for trainer in trainers.values():
        trainer.close()
    return {name: ratio(turns[name], turns[names[-1]]) for name in names[:-1]}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--minibatches", str(options.minibatches), "--memory-of"]
    figures = {
        name: [
            json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
            for _ in range(options.processes)
        ]
        for name in ("dvpo", "ppo")
    }
    peaks = {name: statistics.median(run["peak"] for run in runs) for name, runs in figures.items()}
    return {"ratio": peaks["dvpo"] / peaks["ppo"], "median_peak_bytes": peaks, "runs": figures}


def peak_memory(name: str, folder: Path, minibatches: int) -> dict[str, int]:
    """Bytes resident before the first step, and at the peak of three steps."""
    trainer = make_trainer(name, write_model(folder / "model"), folder / "run", f"update.minibatches={minibatches}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak mark starts again from the present size
    before = resident("VmRSS")
    for _ in range(3):
        trainer.train_step()
    return {"before": before, "peak": resident("VmHWM")}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
