"""How much faster, and in how much less memory, is the exact quantile-Huber loss than the naive one?

Both compute the same term, forward and backward, on one thread: `dvpo.core.quantiles.quantile_huber_loss`, and the
float32 broadcast form with autograd that the tests use as the reference. Inputs are standard normal and predictions
are unsorted, which is the slower case for a search.

Time: the two take turns (A B A B ...), so that other users of the machine disturb both. A turn of the exact form is
the mean of 20 runs, since a single one fits between two disturbances and another is hit in full. Wall-clock and CPU
time are taken; the speed-up is the median over the pairs of turns.

Memory: each form runs in fresh processes of its own, first on one token, so that what is loaded and allocated once
does not count; then the kernel's peak mark is reset, and the rise of the peak resident size over one run at full size
is read. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpo.core.quantiles import quantile_huber_loss, quantile_levels
from dvpo.provenance import machine, source, versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "core"))
from naive import naive_quantile_huber_loss  # noqa: E402

FORMS: dict[str, Callable[..., Tensor]] = {"exact": quantile_huber_loss, "naive": naive_quantile_huber_loss}
RUNS_IN_A_TURN = {"exact": 20, "naive": 1}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_rise(options.memory_of, options))
        return
    seconds = interleaved_seconds(options)
    memory = {name: [fresh_peak_rise(name) for _ in range(options.processes)] for name in FORMS}
    result = summary(options, seconds, memory)
    show(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--quantiles", type=int, default=200)
    parser.add_argument("--atoms", type=int, default=200)
    parser.add_argument("--kappa", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of turns, after one untimed")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes a form for the memory")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quantile_loss.json")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def inputs(options: argparse.Namespace, tokens: int) -> tuple[Tensor, Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(tokens, options.heads, options.quantiles, generator=generator, requires_grad=True)
    targets = torch.randn(tokens, options.atoms, generator=generator)
    return predictions, targets, quantile_levels(options.quantiles), options.kappa


def run(name: str, arguments: tuple[Tensor, Tensor, Tensor, float]) -> None:
    arguments[0].grad = None
    FORMS[name](*arguments).mean().backward()


def interleaved_seconds(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds a run of each turn: clock -> form -> turns."""
    arguments = inputs(options, options.tokens)
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in FORMS} for clock in CLOCKS}
    for _ in range(1 + options.pairs):
        for name, runs in RUNS_IN_A_TURN.items():
            start = {clock: read() for clock, read in CLOCKS.items()}
            for _ in range(runs):
                run(name, arguments)
            for clock, read in CLOCKS.items():
                seconds[clock][name].append((read() - start[clock]) / runs)
    return {clock: {name: turns[1:] for name, turns in forms.items()} for clock, forms in seconds.items()}


def fresh_peak_rise(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_rise(name: str, options: argparse.Namespace) -> int:
    """Bytes by which one run lifts this process's peak resident size above what was resident before."""
    run(name, inputs(options, 1))
    arguments = inputs(options, options.tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak mark starts again from the present size
    before = resident("VmRSS")
    run(name, arguments)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def summary(
    options: argparse.Namespace,
    seconds: dict[str, dict[str, list[float]]],
    memory: dict[str, list[int]],
) -> dict[str, Any]:
    median_rise = {name: statistics.median(rises) for name, rises in memory.items()}
    here = source()
    return {
        "sizes": {name: getattr(options, name) for name in ("tokens", "heads", "quantiles", "atoms", "kappa")},
        "speedup": {clock: speedup(forms) for clock, forms in seconds.items()},
        "peak_rise_share": median_rise["exact"] / median_rise["naive"],
        "median_peak_rise_bytes": median_rise,
        "peak_rise_bytes": memory,
        "median_seconds": {
            clock: {name: statistics.median(turns) for name, turns in forms.items()} for clock, forms in seconds.items()
        },
        "seconds": seconds,
        "machine": machine("cpu"),
        "load_average": os.getloadavg()[0],  # above the number of cores, others were running too
        "versions": versions(),
        "commit": here.commit,
        "dirty": here.dirty,
    }


def speedup(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = [naive / exact for exact, naive in zip(seconds["exact"], seconds["naive"], strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def show(result: dict[str, Any]) -> None:
    print(f"{'form':8}{'wall ms':>10}{'CPU ms':>10}{'peak rise MB':>15}")
    for name in FORMS:
        wall, cpu = (1e3 * result["median_seconds"][clock][name] for clock in CLOCKS)
        print(f"{name:8}{wall:10.1f}{cpu:10.1f}{result['median_peak_rise_bytes'][name] / 1e6:15.1f}")
    for clock, ratio in result["speedup"].items():
        low, high = ratio["lowest"], ratio["highest"]
        print(f"exact is {ratio['median']:.0f} times faster in {clock} time ({low:.0f} to {high:.0f} over the pairs)")
    print(f"its peak memory rises by {100 * result['peak_rise_share']:.2f}% of the naive form's")


if __name__ == "__main__":
    main()
