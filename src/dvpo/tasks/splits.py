"""How the embedded tasks fill a split: different items, held out or not, the same ones for the same seed."""

import random
from collections.abc import Callable
from typing import Protocol, TypeVar

from dvpo.errors import InputError

LARGEST_SPLIT = 50_000


class Drawn(Protocol):
    """A question or a goal."""

    @property
    def id(self) -> str: ...

    @property
    def held_out(self) -> bool:
        """Whether it is kept for evaluation: a property of the item, so that no seed can mix the splits."""
        ...


Item = TypeVar("Item", bound=Drawn)


def draw_split(
    draw: Callable[[random.Random], Item], count: int, held_out: bool, seed: str, task: str
) -> tuple[Item, ...]:
    """Draw `count` different items, held out or not.

    Raises:
        InputError: a count that is negative, or more than the task can be asked for.
    """
    if not 0 <= count <= LARGEST_SPLIT:
        raise InputError(
            f"the {task} task's split of {count} must have 0 to {LARGEST_SPLIT} examples: choose another size"
        )
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw(rng)
        if item.held_out == held_out:
            items[item.id] = item
    return tuple(items.values())
