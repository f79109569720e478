"""Chain arithmetic: `23+8-5=` is answered step by step, `23+8=31;31-5=26;#26`.

Two things make this small task worth training on. The demonstrations are wrong in a *systematic* way: some
facts of the form (units digit, sign, operand) are mislearnt by the demonstrator, each with its own wrong
result and its own frequency. A model that imitates them is wrong where they are, greedily too, yet also writes
the right result often enough for a reward to find it. And a repaired fact is repaired everywhere, so that what
is learnt on short chains (in distribution) can show on longer ones (out of distribution).
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from dvpo.tasks import Example, Prompt, Reward, SplitTask
from dvpo.tasks.splits import draw_split

TASK_VERSION = 1
"""Raised when questions, flaws or the written form change, so that no cached warm start outlives its task."""

LARGEST = 99
FLAWED_SHARE = 0.4
FLAW_PROBABILITIES = (0.35, 0.85)
HELD_OUT_SHARE = 0.25
ID_OPERATIONS = (2, 3)
OOD_OPERATIONS = (4, 6)

ANSWER = re.compile(r"[^#]*#(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Question:
    """A chain: `start`, then signed operands (never 0) that are added in turn."""

    start: int
    operands: tuple[int, ...]

    @property
    def text(self) -> str:
        return f"{self.start}{''.join(f'{operand:+d}' for operand in self.operands)}="

    @property
    def answer(self) -> int:
        return self.start + sum(self.operands)

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the text's SHA-256: the same on every machine, in every run."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def held_out(self) -> bool:
        """Whether the question is kept for evaluation: its hash alone decides, for chains of every length."""
        return hash_share(self.id) < HELD_OUT_SHARE

    @classmethod
    def draw(cls, operations: int, rng: random.Random) -> "Question":
        """Draw a start in 10..89 and operands in 1..9, of signs such that no partial sum leaves 0..99."""
        start = value = rng.randint(10, 89)
        operands = []
        for _ in range(operations):
            operand = rng.randint(1, 9) * rng.choice((-1, 1))
            if not 0 <= value + operand <= LARGEST:
                operand = -operand
            value += operand
            operands.append(operand)
        return cls(start, tuple(operands))


class Flaw(NamedTuple):
    """What the demonstrator gets wrong about one fact: the error it adds, and how often it does."""

    error: int
    probability: float


@cache
def flaw(units: int, operand: int) -> Flaw | None:
    """Look up the flaw for a value ending in `units` and a signed operand; None where the fact is sound."""
    fact = f"{units}{operand:+d}"
    if hash_share(f"flawed {fact}") >= FLAWED_SHARE:
        return None
    errors = (-10, -2, -1, 1, 2, 10)
    low, high = FLAW_PROBABILITIES
    return Flaw(
        error=errors[int(hash_share(f"error {fact}") * len(errors))],
        probability=low + (high - low) * hash_share(f"probability {fact}"),
    )


def hash_share(text: str) -> float:
    """Map a text to a number in [0, 1) that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class Demonstration(NamedTuple):
    """One worked solution, and the errors that slipped in: (fact, error) for each flawed step."""

    question: Question
    solution: str
    slips: tuple[tuple[str, int], ...]


def demonstrate(question: Question, rng: random.Random) -> Demonstration:
    """Work through a question as the flawed demonstrator does, carrying on from each wrong result.

    A solution in which a value leaves 0..99 is thrown away and drawn again.
    """
    while True:
        value, steps, slips = question.start, [], []
        for operand in question.operands:
            known = flaw(value % 10, operand)
            slip = known.error if known and rng.random() < known.probability else 0
            if slip:
                slips.append((f"{value % 10}{operand:+d}", slip))
            result = value + operand + slip
            steps.append(f"{value}{operand:+d}={result};")
            value = result
            if not 0 <= value <= LARGEST:
                break
        else:
            return Demonstration(question, f"{''.join(steps)}#{value}", tuple(slips))


def parse_answer(completion: str) -> int | None:
    """Read the answer: the text ends in the one `#number` it contains; anything else is malformed (None)."""
    match = ANSWER.fullmatch(completion)
    return int(match[1]) if match else None


class ChainArithmetic(SplitTask):
    """The embedded mathematics task: train and `id` are chains of 2-3 operations, `ood` of 4-6.

    `id` and `ood` hold questions that neither the training split nor the warm start's demonstrations contain.

    Args:
        train: number of training questions.
        id: number of held-out questions of the training distribution.
        ood: number of held-out questions with longer chains.
        seed: which questions are drawn.
    """

    name = "math"

    def __init__(self, train: int = 4096, id: int = 256, ood: int = 256, seed: int = 0) -> None:
        self._splits = {
            "train": draw_examples(train, ID_OPERATIONS, held_out=False, seed=f"train {seed}"),
            "id": draw_examples(id, ID_OPERATIONS, held_out=True, seed=f"id {seed}"),
            "ood": draw_examples(ood, OOD_OPERATIONS, held_out=True, seed=f"ood {seed}"),
        }

    def final_answer(self, text: str) -> int | None:
        return parse_answer(text)

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """1.0 where the completion ends in its only `#number` and that is the column `answer`, else 0.0."""
        del prompts, completion_ids
        return [
            float(parse_answer(completion) == answer)
            for completion, answer in zip(completions, columns["answer"], strict=True)
        ]


def draw_examples(count: int, operations: tuple[int, int], held_out: bool, seed: str) -> tuple[Example, ...]:
    """Draw `count` different questions, held out or not, with operations in the inclusive range."""
    questions = draw_split(lambda rng: Question.draw(rng.randint(*operations), rng), count, held_out, seed, "math")
    return tuple(
        Example(
            id=question.id,
            prompt=[{"role": "user", "content": question.text}],
            columns={"answer": question.answer, "operations": len(question.operands)},
        )
        for question in questions
    )
