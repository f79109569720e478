"""Contestants take turns, A B A B ..., so that other users of the machine disturb all of them alike."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dvpo.provenance import machine, source, versions

Turn = Callable[[], float]
"""Makes one step and returns its seconds."""


def timed(step: Callable[[], object]) -> Turn:
    def turn() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return turn


def take_turns(contestants: Mapping[str, Turn], rounds: int, untimed: int = 2) -> dict[str, list[float]]:
    """Seconds of every contestant's turns, a round after the other; the first ones warm caches and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(untimed + rounds):
        for name, turn in contestants.items():
            spent = turn()
            if number >= untimed:
                seconds[name].append(spent)
    return seconds


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """The median over the pairs of turns of one / other, its upper 95% bound, and both medians in milliseconds."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return {
        "median_ratio": statistics.median(ratios),
        "upper_95": upper_bound_of_median(ratios),
        "median_ms": 1e3 * statistics.median(one),
        "of_median_ms": 1e3 * statistics.median(other),
        "pairs": len(ratios),
    }


def upper_bound_of_median(values: Sequence[float], level: float = 0.95) -> float:
    """One-sided bound from the order statistics, whatever the distribution.

    The k-th smallest of n values lies below the median with probability P(Binomial(n, 1/2) >= k); infinite where n is
    too small for the level.
    """
    total, below = len(values), 0.0
    for k, value in enumerate(sorted(values)):
        below += math.comb(total, k) / 2**total  # P(at most k values lie below the median)
        if below >= level:
            return value
    return math.inf


def circumstances() -> dict[str, Any]:
    here = source()
    return {
        "machine": machine("cpu"),
        "threads": 1,
        "load_average": os.getloadavg()[0],  # above the number of cores, others were running too
        "versions": versions(),
        "commit": here.commit,
        "dirty": here.dirty,
    }
