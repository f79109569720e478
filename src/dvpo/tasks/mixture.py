"""Several tasks in one run, each with its own prompts, environments, verifier and held-out splits.

An example's id is `<task>/<its own id>`, so ids stay unique, and its column `task` says which task judges it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from dvpo.errors import InputError
from dvpo.tasks import Environment, Example, Prompt, Reward, SplitTask, Task

SPLITS = ("train", "id", "ood")
COLUMN = "task"
"""Of a mixture's examples: the name of the task that each belongs to."""


class Mixture(SplitTask):
    """A task made of tasks.

    `train`, `id` and `ood` hold the examples of all of them, one task after the other; `math/id` those of one.

    Args:
        tasks: with different names.
        weights: how often a prompt of each is drawn, in proportion; positive.
        labels: what the mixture calls each of them; none, or "": its own name.

    Raises:
        InputError: two tasks of one name, a task without training examples or with a column `task` or `self`.
    """

    name = "mix"

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float], labels: Sequence[str] = ()) -> None:
        names = [label or task.name for task, label in zip_longest(tasks, labels)]
        self.parts: Mapping[str, Task] = dict(zip(names, tasks, strict=True))
        if len(self.parts) < len(tasks):
            double = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"task.mix: two tasks are called {double}: give each a label of its own, or the same task once, with "
                "the sum of the weights"
            )
        self.weights: Mapping[str, float] = dict(zip(self.parts, weights, strict=True))
        self.knows_truth = all(getattr(task, "knows_truth", True) for task in tasks)
        self._splits: dict[str, Sequence[Example]] = dict.fromkeys(SPLITS, ())
        self._columns: dict[str, set[str]] = {}
        for name, task in self.parts.items():
            self._add(name, task)

    def _add(self, name: str, task: Task) -> None:
        self._columns[name] = set()
        for split in SPLITS:
            examples = task.split(split)
            if split == "train" and not examples:
                raise InputError(f"task.mix: {name} has no training example: give it one, or leave it out")
            columns = {column for example in examples for column in example.columns}
            if taken := {COLUMN, "self"} & columns:
                column = taken.pop()
                raise InputError(f"task.mix: {name} has a column `{column}`, which a mix needs for itself: rename it")
            self._columns[name] |= columns
            renamed = tuple(replace(e, id=f"{name}/{e.id}", columns={**e.columns, COLUMN: name}) for e in examples)
            self._splits[f"{name}/{split}"] = renamed
            self._splits[split] = (*self._splits[split], *renamed)

    def environment(self, example: Example) -> Environment:
        name = example.columns[COLUMN]
        own = {column: value for column, value in example.columns.items() if column != COLUMN}
        return self.parts[name].environment(replace(example, id=example.id.removeprefix(f"{name}/"), columns=own))

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """Each response is judged by its own task, which is given the columns of its own examples only."""
        rewards: list[Reward] = [None] * len(prompts)
        for name, task in self.parts.items():
            rows = [i for i, owner in enumerate(columns[COLUMN]) if owner == name]
            if not rows:
                continue
            own = {column: [columns[column][i] for i in rows] for column in columns if column in self._columns[name]}
            judged = task.true_reward(
                [prompts[i] for i in rows], [completions[i] for i in rows], [completion_ids[i] for i in rows], **own
            )
            for i, reward in zip(rows, judged, strict=True):
                rewards[i] = reward
        return rewards


def each_of_its_tasks(task: Task, split: str) -> list[str]:
    """Of a mixture's `train`, `id` or `ood` those of each task, where it has them; any other split as it is."""
    if not isinstance(task, Mixture) or split not in SPLITS:
        return [split]
    return [name for name in (f"{part}/{split}" for part in task.parts) if task.split(name)] or [split]


def held_out(task: Task) -> list[str]:
    """The splits that a task is judged by: `id` and `ood` where it has them, of a mixture those of each task."""
    names = [f"{part}/" for part in task.parts] if isinstance(task, Mixture) else [""]
    return [f"{part}{split}" for part in names for split in SPLITS[1:] if task.split(f"{part}{split}")]
