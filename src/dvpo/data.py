"""Which prompts come next: passes over the training split, each in an order of its own."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from dvpo.errors import InputError
from dvpo.seeding import derive_seed
from dvpo.tasks import Example


class PromptStream:
    """Draws prompts without replacement, pass after pass.

    The order of a pass is keyed by (seed, pass), so the whole state is one number: how many were drawn. `visit` is
    the pass, which is how often the prompt had been drawn before.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self.examples, self.seed, self.drawn = examples, seed, 0
        ids = [example.id for example in examples]
        if len(set(ids)) < len(ids):
            double = next(name for name, number in Counter(ids).items() if number > 1)
            raise InputError(f"task: the prompt id {double!r} stands twice in the training split: give each its own id")

    def next(self, count: int) -> list[tuple[Example, int]]:
        """The next prompts, each with its visit."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> tuple[Example, int]:
        visit, place = divmod(self.drawn, len(self.examples))
        if place == 0 or not hasattr(self, "_order"):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", visit))
            self._order = torch.randperm(len(self.examples), generator=generator).tolist()
        self.drawn += 1
        return self.examples[self._order[place]], visit

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "examples": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["examples"] != self._fingerprint():
            raise InputError(
                "resume: the training prompts are not those of the checkpoint: give the same data, or start another run"
            )
        self.drawn = state["drawn"]
        self.__dict__.pop("_order", None)

    def _fingerprint(self) -> int:
        """Tells two training splits apart by their prompts' ids and order."""
        return derive_seed(*(example.id for example in self.examples))
