"""How much faster, and in how much less memory, is the exact quantile-Huber loss than the naive one?

Both compute the same term, forward and backward, on one thread: `dvpo.core.quantiles.quantile_huber_loss`, and the
float32 broadcast form with autograd that the tests use as the reference. Inputs are standard normal and predictions
are unsorted, which is the slower case for a search.

Time: the two run in turn (A B A B ...), so that other users of the machine disturb both; medians are compared, and
the ratio is the median over the pairs. Memory: each form runs in fresh processes of its own, first on one token, so
that what is loaded and allocated once does not count; then the kernel's peak mark is reset, and the rise of the peak
resident size over one run at full size is read. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dvpo.core.quantiles import quantile_huber_loss, quantile_levels
from dvpo.provenance import machine, source, versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "core"))
from naive import naive_quantile_huber_loss  # noqa: E402

FORMS: dict[str, Callable[..., Tensor]] = {"exact": quantile_huber_loss, "naive": naive_quantile_huber_loss}


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
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of runs, after two untimed ones")
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


def interleaved_seconds(options: argparse.Namespace) -> dict[str, list[float]]:
    arguments = inputs(options, options.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(2 + options.pairs):
        for name, times in seconds.items():
            start = time.perf_counter()
            run(name, arguments)
            times.append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


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
    options: argparse.Namespace, seconds: dict[str, list[float]], memory: dict[str, list[int]]
) -> dict[str, object]:
    ratios = [naive / exact for exact, naive in zip(seconds["exact"], seconds["naive"], strict=True)]
    rises = {name: statistics.median(rise) for name, rise in memory.items()}
    commit = source()
    return {
        "sizes": {name: getattr(options, name) for name in ("tokens", "heads", "quantiles", "atoms", "kappa")},
        "seconds_median": {name: statistics.median(times) for name, times in seconds.items()},
        "speedup_median_of_pairs": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "peak_rise_bytes_median": rises,
        "peak_rise_share": rises["exact"] / rises["naive"],
        "seconds": seconds,
        "peak_rise_bytes": memory,
        "machine": machine("cpu"),
        "versions": versions(),
        "commit": commit.commit,
        "dirty": commit.dirty,
    }


def show(result: dict) -> None:
    print(f"{'form':8}{'median ms':>12}{'peak rise MB':>15}")
    for name in FORMS:
        milliseconds = 1e3 * result["seconds_median"][name]
        print(f"{name:8}{milliseconds:12.1f}{result['peak_rise_bytes_median'][name] / 1e6:15.1f}")
    low, high = result["speedup_range"]
    print(f"exact is {result['speedup_median_of_pairs']:.0f} times faster ({low:.0f} to {high:.0f} over the pairs)")
    print(f"and its peak rises by {100 * result['peak_rise_share']:.2f}% of the naive form's")


if __name__ == "__main__":
    main()
