"""What a run does about the faults of its rewards: it counts them by kind, and stops where told to."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from dvpo.errors import InputError, RunStoppedError
from dvpo.reward_lane import FaultKind
from dvpo.rewards import Fault, headline
from dvpo.sampling import Episode
from dvpo.settings import RewardConfig

KINDS: tuple[str, ...] = get_args(FaultKind)
BROKEN = ("wrong_length", "wrong_type", "non_finite")
"""What does not pass by itself; exceptions and time-outs may."""
SHOWN, SAMPLE = 8, ("prompt_id", "visit", "sample")


class FaultTally:
    """How many answers lost their reward to a fault so far, of how many, and the first such fault."""

    def __init__(self) -> None:
        self.answers = self.lost = 0
        self.first: str | None = None

    def add(self, faults: Sequence[Fault], sampled: int) -> None:
        """Count one step's faults, of so many answers; cured ones cost nothing."""
        lost = [fault for fault in faults if not fault.cured]
        self.answers += sampled
        self.lost += len({fault.index for fault in lost})
        if lost and self.first is None:
            self.first = headline(lost[0])

    def __str__(self) -> str:
        return f"reward: {self.lost:,} of {self.answers:,} answers failed, first: {self.first}"


def fault_rows(faults: Sequence[Fault], episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Each fault as `faults.jsonl` shows it, with the sample that it struck: index i is that of episode i.

    The first `SHOWN` bring its texts, the others say which it was: with long responses a failing service fills disks.
    """
    rows = []
    for place, fault in enumerate(faults):
        record = {} if fault.index is None else episodes[fault.index].record()
        shown = record if place < SHOWN else {key: record[key] for key in SAMPLE if key in record}
        rows.append({"kind": fault.kind, "message": fault.message, "cured": fault.cured, **shown})
    return rows


def lost_in_evaluation(faults: Sequence[Mapping[str, Any]]) -> str:
    """What is to be said of an evaluation's faults, rows as above; nothing if no answer lost its reward."""
    lost = [row for row in faults if not row["cured"]]
    if not lost:
        return ""
    first = headline(Fault(lost[0]["kind"], None, lost[0]["message"]))
    times = "once" if len(lost) == 1 else f"{len(lost):,} times"
    return f"the reward failed {times}, and what it failed on counts in no figure; the first: {first}"


def fault_figures(faults: Sequence[Fault]) -> dict[str, float]:
    """`reward/faults`, those of them that a later attempt cured, and how many there are of each kind."""
    counts = {f"reward/faults_{kind}": float(sum(fault.kind == kind for fault in faults)) for kind in KINDS}
    return {"reward/faults": float(len(faults)), "reward/cured": float(sum(f.cured for f in faults)), **counts}


def refuse_broken_reward(faults: Sequence[Fault], batch: int) -> None:
    """Stop a run whose first step has no reward at all because the function answers in the wrong form.

    Exceptions and time-outs may pass and never end a run; a wrong length, type or an infinity in every sample will not.

    Raises:
        InputError: with the first fault.
    """
    form = [fault for fault in faults if fault.kind in BROKEN]
    if len({fault.index for fault in form}) == batch:
        raise InputError(
            f"reward.function: every reward of the first step is unusable, {form[0].message}: "
            "return one finite number (or None, or a list) for each completion"
        )


def stop_at_faults(faults: Sequence[Fault], batch: int, step: int, settings: RewardConfig) -> None:
    """Stop a run of which too many samples lost their reward to a fault in one step.

    Args:
        faults: of the step; cured ones cost nothing.
        batch: responses of the step.
        step: named in the message.
        settings: `on_fault` and `max_fault_share`.

    Raises:
        RunStoppedError: with the share and the last fault.
    """
    lost = {fault.index for fault in faults if not fault.cured}
    bound = 0.0 if settings.on_fault == "stop" else settings.max_fault_share
    if len(lost) <= bound * batch:
        return
    setting = "reward.on_fault = stop" if settings.on_fault == "stop" else f"reward.max_fault_share = {bound:g}"
    last = next(fault for fault in reversed(faults) if not fault.cured)
    raise RunStoppedError(
        f"step {step}: {len(lost)} of {batch} responses lost their reward to a fault, more than {setting} allows; the "
        f"last one: {headline(last)}; all of them are in faults.jsonl: "
        "mend what failed, then go on by --resume"
    )
