"""Guarded rewards made from source, and what a test asks of them."""

import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dvpo.rewards import GuardedReward, Scores

Guard = Callable[..., GuardedReward]


def guards_in(tmp_path: Path) -> Iterator[Guard]:
    """Make a guarded reward from the source of a function named `reward`, and close it after the test."""
    made: list[GuardedReward] = []

    def make(source: str, **options: Any) -> GuardedReward:
        (tmp_path / "my_rewards.py").write_text(textwrap.dedent(source))
        made.append(GuardedReward("my_rewards:reward", path=[tmp_path], **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def score(reward: GuardedReward, completions: list[str], **columns: Any) -> Scores:
    size = len(completions)
    return reward(["2+2="] * size, completions, [[7, 8]] * size, columns)


def kinds(scores: Scores) -> list[tuple[str, int | None]]:
    return [(fault.kind, fault.index) for fault in scores.faults]


def gone(pid: int, seconds: float = 30.0) -> bool:
    """Has the process ended (or become a zombie that only waits to be reaped) within the time?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
