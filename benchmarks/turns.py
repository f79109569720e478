"""Timing by turns: forms take turns A B A B, so that whatever else runs on the machine disturbs them alike."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def take_turns(forms: Mapping[str, Callable[[], object]], rounds: int, runs: Mapping[str, int]) -> dict[str, Any]:
    """Seconds a run, clock -> form -> rounds, after one round untimed. A turn is the mean of `runs` (1 if not given):
    a single short one would fit between two disturbances and another be hit in full."""
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in forms} for clock in CLOCKS}
    for _ in range(1 + rounds):
        for name, run in forms.items():
            start = {clock: read() for clock, read in CLOCKS.items()}
            for _ in range(runs.get(name, 1)):
                run()
            for clock, read in CLOCKS.items():
                seconds[clock][name].append((read() - start[clock]) / runs.get(name, 1))
    return {clock: {name: turns[1:] for name, turns in named.items()} for clock, named in seconds.items()}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median over the rounds of slow / fast, with a 95% bootstrap interval of that median."""
    return spread([s / f for s, f in zip(slow, fast, strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """The median and a 95% percentile-bootstrap interval of it; seeded."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "low": medians[50], "high": medians[1949]}


def medians(seconds: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        clock: {name: statistics.median(turns) for name, turns in named.items()} for clock, named in seconds.items()
    }


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The least-squares slope of log seconds over log size: 1 is linear."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(s) for s in seconds]).slope
