"""Live progress of a run: a redrawn line in a terminal, a plain log elsewhere."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dvpo.alarms import NAMES as ALARMS
from dvpo.evaluate import interval_text
from dvpo.faults import FaultTally
from dvpo.metrics import MANY_CUT
from dvpo.plain_text import plain_console
from dvpo.rewards import Fault

SHOWN = (
    ("reward/true", "true"),
    ("reward/observed", "observed"),
    ("critic/value_error", "value error"),
    ("actor/kl", "KL"),
    ("time/tokens_per_second", "tokens/s"),
)
WHEN_ABOVE = (
    ("reward/missing", "missing", 0.0),
    ("rollout/truncated", "cut", MANY_CUT),
    ("actor/skipped_updates", "SKIPPED UPDATES", 0.0),
    ("critic/skipped_updates", "CRITIC SKIPPED UPDATES", 0.0),
    *((f"alarm/{name}", f"ALARM {name}", 0.0) for name in ALARMS),
)
"""Shown only where there is something to worry about: a figure above its bound."""
PLAIN_EVERY_SECONDS = 10.0


class RunProgress:
    """Shows step, true and observed reward, value error, KL, speed and time left; an `Observer` of the trainer.

    Answers that lost their reward to a fault are said at the first step that has some, and in total at the end.
    """

    def __init__(self, name: str, steps: int, folder: Path, start: int = 0, console: Console | None = None) -> None:
        self.console = plain_console() if console is None else console
        self.name, self.steps, self.start = name, steps, start
        self._tally, self._faults_file = FaultTally(), folder / "faults.jsonl"
        self._rewarded = False
        """Some answer had a reward."""
        self._began = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, completed=start, figures="")

    def on_rewards(self, step: int, faults: Sequence[Fault], answers: int) -> None:
        silent = not self._tally.lost
        self._tally.add(faults, answers)
        if silent and self._tally.lost:
            now = FaultTally()  # of this step alone
            now.add(faults, answers)
            self._say_faults(f"step {step}, {now}")

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        known = {name: value for name, value in figures.items() if math.isfinite(value)}  # the rest is not defined
        self._rewarded |= known.get("reward/missing", 0.0) < 1
        shown = [*SHOWN, *((key, label) for key, label, bound in WHEN_ABOVE if known.get(key, 0.0) > bound)]
        text = "  ".join(f"{label} {_figure(key, known[key])}" for key, label in shown if key in known)
        self._bar.update(self._task, completed=step, figures=text)
        now = time.monotonic()
        if not self.console.is_terminal and (step == self.steps or now - self._said >= PLAIN_EVERY_SECONDS):
            self._said = now
            left = (now - self._began) / max(step - self.start, 1) * (self.steps - step)
            self.console.print(f"{self.name} step {step}/{self.steps}  {text}  {left:.0f} s left", soft_wrap=True)

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None:
        splits = [name[len("eval/") : -len("/accuracy")] for name in figures if name.endswith("/accuracy")]
        if splits:
            text = ", ".join(_result(split, figures) for split in splits)
            self.console.print(f"{self.name} step {step}/{self.steps}  held-out accuracy (%) {text}", soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._tally.lost:
            self._say_faults(str(self._tally))
        if self._tally.answers and not self._rewarded:
            self._say(f"reward: none of {self._tally.answers:,} answers had one, so nothing was learnt from them")

    def _say_faults(self, text: str) -> None:
        self._say(f"{text}; all of them: {self._faults_file}")

    def _say(self, text: str) -> None:
        self.console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _result(split: str, figures: dict[str, float]) -> str:
    """`ID 45.3 [39, 51]`, and the mean reward where that says more than the share of items solved."""
    accuracy, reward = (figures[f"eval/{split}/{name}"] for name in ("accuracy", "reward"))
    graded = f" reward {_short(reward)}" if abs(reward - accuracy) > 1e-6 else ""
    items, unknown = (int(figures[f"eval/{split}/{name}"]) for name in ("items", "unknown"))
    lacking = f" ({unknown} of {items + unknown} had no reward)" if unknown else ""
    return f"{split.upper()} {interval_text(figures, f'eval/{split}/accuracy')}{graded}{lacking}"


def _figure(key: str, value: float) -> str:
    return f"{value:,.0f}" if key == "time/tokens_per_second" else _short(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
