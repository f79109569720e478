"""How much faster, and in how much less memory, is the critic's loss than its pairwise form, and how does it grow?

Both compute the eight terms of `dvpo.core.risk.critic_terms`, the sum of all of them, forward and backward, on one
thread: the library's function, and the float32 broadcast form with autograd that the tests use as the reference. It
makes the pairwise tensor once for both quantile terms. Inputs are standard normal and predictions are unsorted, which
is the slower case for a search.

Time: the two take turns; wall-clock and CPU time are taken; the speed-up is the median over the pairs of turns, with a
95% bootstrap interval. Growth: sizes take turns, one of tokens, N, M = L or L is varied; the exponent is the slope of
log CPU time over log size.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import exponent, medians, ratios, spread, take_turns

from dvpo.core.quantiles import quantile_levels
from dvpo.core.risk import critic_terms
from dvpo.provenance import machine, source, versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "core"))
from naive import naive_critic_terms  # noqa: E402

FORMS: dict[str, Callable[..., dict[str, Tensor]]] = {"exact": critic_terms, "naive": naive_critic_terms}
RUNS = {"exact": 20}
KAPPA, ETA, ALPHA, BETA = 0.1, 2.0, 0.1, 0.1
SIZES = {"tokens": 512, "heads": 3, "quantiles": 200, "atoms": 200}
GROWTH = {
    "quantiles and atoms": [{"quantiles": m, "atoms": m} for m in (64, 128, 256, 512, 1024)],
    "atoms": [{"atoms": n} for n in (64, 128, 256, 512, 1024)],
    "heads": [{"heads": n} for n in (1, 2, 4, 8)],
    "tokens": [{"tokens": n} for n in (128, 256, 512, 1024)],
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_rise(options.memory_of))
        return
    tokens = inputs(**SIZES)
    seconds = take_turns({name: lambda name=name: run(name, tokens) for name in FORMS}, options.pairs, RUNS)
    memory = {name: [fresh_peak_rise(name) for _ in range(options.processes)] for name in FORMS}
    growth = {what: grow(what, cases, options.rounds) for what, cases in GROWTH.items()}
    result = summary(seconds, memory, growth)
    show(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of turns, after one untimed")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds over the sizes of each growth")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes a form for the memory")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quantile_loss.json")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def inputs(tokens: int, heads: int, quantiles: int, atoms: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(tokens, heads, quantiles, generator=generator, requires_grad=True)
    targets = torch.randn(tokens, atoms, generator=generator)
    return predictions, targets, quantile_levels(quantiles), KAPPA, ETA, ALPHA, BETA


def run(name: str, arguments: tuple[Any, ...]) -> None:
    arguments[0].grad = None
    torch.stack(list(FORMS[name](*arguments).values())).sum(dim=0).mean().backward()


def grow(what: str, cases: list[dict[str, int]], rounds: int) -> dict[str, Any]:
    arguments = [inputs(**(SIZES | case)) for case in cases]
    forms = {str(i): lambda given=given: run("exact", given) for i, given in enumerate(arguments)}
    turns = take_turns(forms, rounds, dict.fromkeys(forms, 3))["cpu"]
    sizes = [case[what.split(maxsplit=1)[0]] for case in cases]
    return {
        "sizes": [SIZES | case for case in cases],
        "median_cpu_seconds": [statistics.median(turn) for turn in turns.values()],
        "exponent": spread([exponent(sizes, list(round_)) for round_ in zip(*turns.values(), strict=True)]),
    }


def fresh_peak_rise(name: str) -> int:
    command = [sys.executable, __file__, "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_rise(name: str) -> int:
    """Bytes by which one run lifts this process's peak resident size above what was resident before."""
    run(name, inputs(**(SIZES | {"tokens": 1})))
    arguments = inputs(**SIZES)
    Path("/proc/self/clear_refs").write_text("5")  # the peak mark starts again from the present size
    before = resident("VmRSS")
    run(name, arguments)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def summary(seconds: dict[str, Any], memory: dict[str, list[int]], growth: dict[str, Any]) -> dict[str, Any]:
    median_rise = {name: statistics.median(rises) for name, rises in memory.items()}
    here = source()
    return {
        "sizes": {**SIZES, "kappa": KAPPA, "terms": 8},
        "speedup": {clock: ratios(turns["naive"], turns["exact"]) for clock, turns in seconds.items()},
        "peak_rise_share": median_rise["exact"] / median_rise["naive"],
        "median_peak_rise_bytes": median_rise,
        "peak_rise_bytes": memory,
        "growth": growth,
        "median_seconds": medians(seconds),
        "seconds": seconds,
        "machine": machine("cpu"),
        "load_average": os.getloadavg()[0],  # above the number of cores, others were running too
        "versions": versions(),
        "commit": here.commit,
        "dirty": here.dirty,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'form':8}{'wall ms':>10}{'CPU ms':>10}{'peak rise MB':>15}")
    for name in FORMS:
        wall, cpu = (1e3 * seconds[name] for seconds in result["median_seconds"].values())
        print(f"{name:8}{wall:10.1f}{cpu:10.1f}{result['median_peak_rise_bytes'][name] / 1e6:15.1f}")
    for clock, ratio in result["speedup"].items():
        low, high = ratio["low"], ratio["high"]
        print(f"exact is {ratio['median']:.0f} times faster in {clock} time (95% {low:.0f} to {high:.0f})")
    print(f"its peak memory rises by {100 * result['peak_rise_share']:.2f}% of the naive form's")
    for what, growth in result["growth"].items():
        slope = growth["exponent"]
        print(f"grows with {what} to the power {slope['median']:.2f} (95% {slope['low']:.2f} to {slope['high']:.2f})")


if __name__ == "__main__":
    main()
