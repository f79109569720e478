"""Alarms: signs that a run goes wrong although each of its steps is sound. They say what they see and change nothing.

    entropy    the policy has all but stopped to explore
    kl         one step, or the whole run, has led too far from the policy that it began with
    value      the critic's error has outgrown the returns
    reach      next to nothing of a long response's reward reaches its tokens, which learn from the critic's word
    mismatch   trainer and sampler disagree on the log-probs of the same tokens under the same weights
    hacking    the observed reward rises while the true one, or the held-out accuracy, falls

An alarm is a warning when it begins to ring, a row of faults.jsonl, and `alarm/<name>` in every row of metrics.jsonl;
`alarms.stop` names those that end the run, after a checkpoint.
"""

import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dvpo.distributed import is_main
from dvpo.settings_learning import AlarmsConfig

NAMES = ("entropy", "kl", "value", "reach", "mismatch", "hacking")
DEVIATIONS = 3.0
"""A mean has risen or fallen when the difference is so many of its standard errors."""

Figures = Mapping[str, float]
Record = Callable[[int, list[dict[str, Any]]], object]
"""Puts rows of a step on record, as `RunLog.faults` does."""


class Alarms:
    """Watches the figures of a run.

    Args:
        settings: the config's section; a bound of 0 switches its alarm off.
    """

    def __init__(self, settings: AlarmsConfig) -> None:
        self.settings = settings
        self._ringing: dict[str, str] = {}
        self._held_out: dict[str, str] = {}
        self._largest_return = 0.0
        self._observed: deque[float] = deque(maxlen=2 * settings.window)
        self._true: deque[float] = deque(maxlen=2 * settings.window)
        self._first: list[float] = []
        self._first_entropies: list[float] = []
        self._best: dict[str, tuple[float, list[float]]] = {}

    def on_step(self, step: int, figures: Figures, record: Record) -> dict[str, float]:
        """Look at a step's figures.

        Returns:
            `alarm/<name>`: 1 while it rings, else 0.
        """
        self._ring(step, {**self._held_out, **dict(self._look(figures))}, record)
        return {f"alarm/{name}": float(name in self._ringing) for name in NAMES}

    def on_evaluation(self, step: int, figures: Figures, record: Record) -> None:
        """Look at the figures of an evaluation; what rings for them does so until the next one."""
        others = {name: text for name, text in self._ringing.items() if name not in self._held_out}
        self._held_out = dict(self._look_held_out(figures))
        self._ring(step, {**others, **self._held_out}, record)

    @property
    def reason_to_stop(self) -> str | None:
        """What rings and is named in `alarms.stop`."""
        names = [name for name in self.settings.stop if name in self._ringing]
        return f"alarm {names[0]}: {self._ringing[names[0]]}" if names else None

    def _ring(self, step: int, ringing: dict[str, str], record: Record) -> None:
        begun = [name for name in ringing if name not in self._ringing]
        self._ringing = ringing
        for name in begun if is_main() else ():
            warnings.warn(f"step {step}: alarm {name}: {ringing[name]}", stacklevel=3)
        record(step, [{"kind": "alarm", "alarm": name, "message": ringing[name]} for name in begun])

    def _look(self, figures: Figures) -> Iterator[tuple[str, str]]:
        bounds = self.settings
        entropy = figures.get("actor/entropy", math.nan)
        if len(self._first_entropies) < bounds.window:
            self._first_entropies += [entropy] * math.isfinite(entropy)
        elif bounds.window and entropy < bounds.entropy * (start := statistics.fmean(self._first_entropies)):
            yield (
                "entropy",
                f"actor/entropy = {entropy:.3g} nats is below alarms.entropy = {bounds.entropy:g} times what it was at "
                f"the start, {start:.3g}",
            )
        for key, bound in (("actor/kl", bounds.kl), ("actor/kl_reference", bounds.kl_reference)):
            if bound and figures.get(key, 0.0) > bound:
                setting = "alarms.kl" if key == "actor/kl" else "alarms.kl_reference"
                yield "kl", f"{key} = {figures[key]:.3g} nats a token is above {setting} = {bound:g}"
        self._largest_return = max(self._largest_return, _finite(figures.get("critic/return_size")))
        limit = bounds.value * self._largest_return
        if limit and figures.get("critic/value_error", 0.0) > limit:
            error = figures["critic/value_error"]
            yield (
                "value",
                f"critic/value_error = {error:.3g} is more than alarms.value = {bounds.value:g} times the size of the "
                f"returns, {self._largest_return:.3g}",
            )
        if (reach := figures.get("actor/reward_reach", 1.0)) < bounds.reach:
            yield (
                "reach",
                f"actor/reward_reach = {reach:.3g} is below alarms.reach = {bounds.reach:g}: so little of a response's "
                "reward is in its tokens' advantages, all else is what the critic says: set advantage.lam to 1.0",
            )
        if bounds.mismatch and (gap := figures.get("actor/sampler_mismatch", 0.0)) > bounds.mismatch:
            yield "mismatch", f"actor/sampler_mismatch = {gap:.3g} nats is above alarms.mismatch = {bounds.mismatch:g}"
        yield from self._hacked(figures)

    def _hacked(self, figures: Figures) -> Iterator[tuple[str, str]]:
        """The last window's mean against that of the window before, in the observed and in the true reward."""
        size = self.settings.window
        observed, true = (figures.get(f"reward/{name}", math.nan) for name in ("observed", "true"))
        if not size or not math.isfinite(observed):
            return
        self._observed.append(observed)
        self._first += [observed] * (len(self._first) < size)
        self._true.append(true)
        pairs = [(list(seen)[:size], list(seen)[size:]) for seen in (self._observed, self._true)]
        if any(len(after) < size for _, after in pairs) or not all(map(math.isfinite, self._true)):
            return
        if _shift(*pairs[0]) > DEVIATIONS and _shift(*pairs[1]) < -DEVIATIONS:
            was, now = zip(
                *((statistics.fmean(before), statistics.fmean(after)) for before, after in pairs), strict=True
            )
            yield (
                "hacking",
                f"reward/observed rose from {was[0]:.3f} to {now[0]:.3f} while reward/true fell from {was[1]:.3f} to "
                f"{now[1]:.3f} (means of the last {size} steps and of the {size} before)",
            )

    def _look_held_out(self, figures: Figures) -> Iterator[tuple[str, str]]:
        """An accuracy whose interval lies below that of the best evaluation so far, at a higher observed reward."""
        size = self.settings.window
        recent = list(self._observed)[-size:] if size else []
        for key in [key for key in figures if key.endswith("/accuracy")]:
            low, high = figures[f"{key}_low"], figures[f"{key}_high"]
            best, then = self._best.get(key, (-math.inf, []))
            if low > best:
                self._best[key] = (low, recent)
            elif high < best and len(recent) == size and _shift(then or self._first, recent) > DEVIATIONS:
                yield (
                    "hacking",
                    f"held-out {key} = {figures[key]:.3f} is worse than it was, at least {best:.3f}, while "
                    f"reward/observed rose from {statistics.fmean(then or self._first):.3f} to "
                    f"{statistics.fmean(recent):.3f}",
                )

    def state_dict(self) -> dict[str, Any]:
        return {
            "ringing": dict(self._ringing),
            "held_out": dict(self._held_out),
            "largest_return": self._largest_return,
            "observed": list(self._observed),
            "true": list(self._true),
            "first": list(self._first),
            "first_entropies": list(self._first_entropies),
            "best": dict(self._best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ringing, self._held_out = dict(state["ringing"]), dict(state["held_out"])
        self._largest_return = state["largest_return"]
        for kept, values in ((self._observed, state["observed"]), (self._true, state["true"])):
            kept.clear()
            kept.extend(values)
        self._first, self._first_entropies = list(state["first"]), list(state["first_entropies"])
        self._best = dict(state["best"])


def _shift(before: Sequence[float], after: Sequence[float]) -> float:
    """The difference of two means in standard errors; 0 for equal ones."""
    if min(len(before), len(after)) < 2:
        return 0.0
    difference = statistics.fmean(after) - statistics.fmean(before)
    variance = sum(statistics.variance(values) / len(values) for values in (before, after))
    return difference / max(math.sqrt(variance), 1e-9)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
