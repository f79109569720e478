"""Contestants take turns, A B A B ..., so that other users of the machine disturb all of them alike."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dvpo.provenance import machine, source, versions


class Spent(NamedTuple):
    """Seconds of one turn: on the wall clock, and of this process on a CPU, where others' work does not show."""

    wall: float
    cpu: float


Turn = Callable[[], Spent]
"""Makes one step."""

Ratio = dict[str, dict[str, float]]
"""Clock -> figures."""


def timed(step: Callable[[], object]) -> Turn:
    def turn() -> Spent:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        return Spent(time.perf_counter() - wall, time.process_time() - cpu)

    return turn


def take_turns(contestants: Mapping[str, Turn], rounds: int, untimed: int = 2) -> dict[str, list[Spent]]:
    """Every contestant's turns, a round after the other; the first ones warm caches and do not count."""
    turns: dict[str, list[Spent]] = {name: [] for name in contestants}
    for number in range(untimed + rounds):
        for name, turn in contestants.items():
            spent = turn()
            if number >= untimed:
                turns[name].append(spent)
    return turns


def ratio(one: Sequence[Spent], other: Sequence[Spent]) -> Ratio:
    """By either clock: the median over the pairs of turns of one / other, its upper 95% bound, both medians in ms."""
    return {clock: _ratio([s[i] for s in one], [s[i] for s in other]) for i, clock in enumerate(Spent._fields)}


def _ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return {
        "median_ratio": statistics.median(ratios),
        "upper_95": upper_bound_of_median(ratios),
        "median_ms": 1e3 * statistics.median(one),
        "of_median_ms": 1e3 * statistics.median(other),
        "pairs": len(ratios),
    }


def show(title: str, figures: Ratio) -> None:
    for clock, row in figures.items():
        print(
            f"{title:32}{clock:5}{row['median_ratio']:7.3f} (95% below {row['upper_95'] or math.inf:.3f})"
            f"{row['median_ms']:9.1f} ms against {row['of_median_ms']:.1f} ms",
            flush=True,
        )


def upper_bound_of_median(values: Sequence[float], level: float = 0.95) -> float | None:
    """One-sided bound from the order statistics, whatever the distribution.

    The k-th smallest of n values lies below the median with probability P(Binomial(n, 1/2) >= k); None where n is too
    small for the level.
    """
    total, below = len(values), 0.0
    for k, value in enumerate(sorted(values)):
        below += math.comb(total, k) / 2**total  # P(at most k values lie below the median)
        if below >= level:
            return value
    return None


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
