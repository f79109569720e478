"""The hundredth hour, in small: 5,000 tiny steps hold their memory and their step time.

    python benchmarks/faults/endurance.py [--steps N]

Resident memory and processor time are noted behind every step; a checkpoint and an evaluation every 250 steps belong
to it. From the second tenth of the run to the last one the medians are to grow by less than 5%.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import run
from outcome import conclude

STEPS = 5000
EVERY = 250
GROWTH = 0.05
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Watch:
    """An observer that notes memory and processor time of every step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.seconds: list[float] = []
        self._before = time.process_time()

    def on_rewards(self, step: int, faults: object, answers: int) -> None: ...

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        now = time.process_time()
        self.bytes.append(resident())
        self.seconds.append(now - self._before)
        self._before = now
        if step % EVERY == 0:
            median = statistics.median(self.seconds[-EVERY:])
            print(f"step {step}: {self.bytes[-1] / 1e6:.1f} MB, {1000 * median:.1f} ms a step", flush=True)

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None: ...


def measure(place: Path, steps: int) -> tuple[bool, dict[str, Any]]:
    """Whether the run holds its memory and its step time, and the figures."""
    watch = Watch()
    every = [f"{section}.every={EVERY}" for section in ("checkpoint", "evaluation")]
    run(place / "run", *every, f"steps={steps}", "log.completions=0", observer=watch)
    tenth = steps // 10
    early, late = slice(tenth, 2 * tenth), slice(-tenth, None)
    memory = [statistics.median(watch.bytes[part]) for part in (early, late)]
    seconds = [statistics.median(watch.seconds[part]) for part in (early, late)]
    growth = {"memory_growth": memory[1] / memory[0] - 1, "step_time_growth": seconds[1] / seconds[0] - 1}
    figures = {
        "steps": steps,
        "resident_mb": [round(value / 1e6, 1) for value in memory],
        "step_ms": [round(1000 * value, 2) for value in seconds],
        **{name: round(value, 4) for name, value in growth.items()},
        "resident_mb_on_the_way": [round(value / 1e6, 1) for value in watch.bytes[EVERY - 1 :: EVERY]],
    }
    return max(growth.values()) < GROWTH, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps, began = parser.parse_args().steps, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dvpo-endurance-") as folder:
        passed, figures = measure(Path(folder), steps)
    conclude("endurance", began, passed, figures)


if __name__ == "__main__":
    main()
