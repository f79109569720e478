"""By whom held-out accuracy is judged, the truth or the user's reward, and how that is said."""

from collections.abc import Mapping
from typing import Any

BY_REWARD = "by your reward (no truth was named)"


def judged(what: str, by_truth: bool) -> str:
    """`Accuracy` as `True accuracy`; where no truth judged, as accuracy by the reward."""
    return f"True {what.lower()}" if by_truth else f"{what} {BY_REWARD}"


def names_truth(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a run, by dotted keys, name a truth: own files have none but `task.truth`."""
    tasks = settings.get("task.mix") or [{"name": settings.get("task.name"), "truth": settings.get("task.truth")}]
    return not any(task.get("name") == "files" and task.get("truth") is None for task in tasks)
