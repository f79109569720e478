"""Science questions: `7ft to cm?` is worked out and answered, `7ft=2.13m=2.13e2cm;#2.13e2`.

What is held out are *compositions*, not facts, for nobody can guess a fact never met:

| kind         | example                          | `train` and `id`                   | `ood`           |
|--------------|----------------------------------|------------------------------------|-----------------|
| `unit`       | `7ft to cm?`                     | to or from a base unit; some pairs | the other pairs |
| `molar_mass` | `M(H2O)?`, in g/mol              | 1 or 2 elements                    | 3 or 4 elements |
| `element`    | `number of Fe?`                  | symbol to number, number to name   | symbol to name  |
| `law`        | `gas n=2 T=3e2 V=1e-2 P?`, in SI | all target variables but one       | the other one   |
| `order`      | `Fe,Al by density?`              | pairs                              | triples         |

The answer is short (numbers within 1%), or one of four options (`7ft to cm? 2.13e3|2.13e2|1.07e2|4.26e2`), each wrong
one being where one mistaken fact leads. Options have no letters: the starting model was never able to find which letter
stands beside its result (docs/log.md). Formulae are drawn, not looked up: most exist in no bottle, but each has a molar
mass.

As in `dvpo.tasks.math`, the demonstrator is wrong in a *systematic* way: some facts are mislearnt, each with its own
wrong value and its own frequency. So imitation errs, yet knows the right value, and a repaired fact is repaired in
every composition.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dvpo.seeding import derive_uniform
from dvpo.tasks import Example, OodKind, Prompt, Reward, SplitTask
from dvpo.tasks.science_facts import NUMBERS, Recall, believing
from dvpo.tasks.science_problems import KINDS, Problem
from dvpo.tasks.splits import draw_split

TASK_VERSION = 2
"""Raised when questions, flaws or the written form change, so that no cached warm start outlives its task."""

HELD_OUT_SHARE = 0.25
OPTIONS_SHARE = 0.5
FLAWED_SHARE = 0.5
FLAW_PROBABILITIES = (0.35, 0.85)

TOLERANCE = 0.01
SEPARATION = 0.025
"""Options differ by more than this, so that no wrong one is right within the tolerance."""

EXACT_KINDS = ("element", "order")
KINDS_WITHOUT_OPTIONS = ("order",)
"""Two elements have two orders only."""

OPTIONS = 4
ANSWER = re.compile(r"[^#]*#([A-Za-z0-9.<+-]{1,24})")
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,8})(\.[0-9]{1,12})?(e[+-]?[0-9]{1,2})?")


# --- answers ---------------------------------------------------------------------------------------------------------


def parse_answer(completion: str) -> str | None:
    """Read the answer: the text ends in the one `#answer` it contains; anything else is malformed (None)."""
    match = ANSWER.fullmatch(completion)
    return match[1] if match else None


def agrees(answer: str | None, right: str, kind: str, tolerance: float = TOLERANCE) -> bool:
    """Whether an answer is the right one: numbers (but atomic ones) within the tolerance, all else to the letter."""
    if answer is None:
        return False
    if kind in EXACT_KINDS or not (NUMBER.fullmatch(answer) and NUMBER.fullmatch(right)):
        return answer == right
    return abs(float(answer) - float(right)) <= tolerance * abs(float(right))


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A problem, asked as it stands or with four options."""

    problem: Problem
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.problem.text + (" " + "|".join(self.options) if self.options else "")

    @property
    def answer(self) -> str:
        """The right answer: one of the options if there are any, else a number to six digits or the very text."""
        return self.choose(self.problem.work(oracle).result) if self.options else self.problem.answer

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the text's SHA-256: the same on every machine, in every run."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def held_out(self) -> bool:
        """Whether the question is kept for evaluation: its text alone decides, for compositions of every kind."""
        return derive_uniform("science held out", self.text) < HELD_OUT_SHARE

    def choose(self, result: str) -> str:
        """The option that agrees with a result; the first where none does."""
        return next((option for option in self.options if agrees(result, option, self.problem.kind)), self.options[0])

    @classmethod
    def draw(cls, rng: random.Random, ood: bool = False) -> "Question":
        """Draw a question of any kind whose composition belongs to the training distribution, or not (`ood`)."""
        problem = rng.choice(KINDS).draw(rng, ood)
        with_options = problem.kind not in KINDS_WITHOUT_OPTIONS and rng.random() < OPTIONS_SHARE
        return cls(problem, draw_options(problem, rng) if with_options else ())


def draw_options(problem: Problem, rng: random.Random) -> tuple[str, ...]:
    """Draw the right result and three wrong ones, each due to one mistake, the demonstrator's own ones first.

    How many of the wrong ones are smaller is drawn too: else the right one would mostly lie in the middle, and could
    be guessed.
    """
    facts: dict[str, Sequence[float]] = {}

    def note(fact: str, truth: float, others: Sequence[float]) -> float:
        facts[fact] = others
        return truth

    def results(mistakes: list[tuple[str, float]]) -> list[str]:
        rng.shuffle(mistakes)
        return [problem.work(believing(dict([mistake]))).result for mistake in mistakes]

    right = problem.work(note).result
    likely = results([(fact, misbelief(fact, others)) for fact, others in facts.items()])
    wrong: list[str] = []
    for result in likely + results([(fact, other) for fact, others in facts.items() for other in others]):
        if not any(agrees(result, option, problem.kind, SEPARATION) for option in (right, *wrong)):
            wrong.append(result)
    smaller = [result for result in wrong if size(result) < size(right)]
    larger = [result for result in wrong if result not in smaller]
    rank = rng.randrange(OPTIONS)
    preferred = dict.fromkeys(smaller[:rank] + larger[: OPTIONS - 1 - rank] + wrong)
    options = [right, *preferred][:OPTIONS]
    rng.shuffle(options)
    return tuple(options)


def size(result: str) -> float:
    """A number, or the atomic number of an element's name."""
    return NUMBERS[result] if result in NUMBERS else float(result)


# --- the demonstrator ------------------------------------------------------------------------------------------------


oracle: Recall = believing({})
"""Knows every fact."""


def flaw_probability(fact: str) -> float:
    """How often the demonstrator gets a fact wrong: 0 for most facts."""
    if derive_uniform("science flawed", fact) >= FLAWED_SHARE:
        return 0.0
    low, high = FLAW_PROBABILITIES
    return low + (high - low) * derive_uniform("science probability", fact)


def misbelief(fact: str, others: Sequence[float]) -> float:
    """What a fact is mistaken for: always the same one of the values it may be mistaken for."""
    return others[int(derive_uniform("science misbelief", fact) * len(others))]


class Demonstration(NamedTuple):
    """One worked solution, and the errors that slipped in: (fact, wrong value) for each flawed step."""

    question: Question
    solution: str
    slips: tuple[tuple[str, float], ...]


def solve(question: Question, recall: Recall) -> str:
    """Write out the solution of somebody who recalls facts in this way."""
    steps, result = question.problem.work(recall)
    return f"{steps}#{question.choose(result) if question.options else result}"


def demonstrate(question: Question, rng: random.Random) -> Demonstration:
    """Work through a question as the flawed demonstrator does, carrying on from each wrong value."""
    slips = {}

    def recall(fact: str, truth: float, others: Sequence[float]) -> float:
        if rng.random() >= flaw_probability(fact):
            return truth
        slips[fact] = misbelief(fact, others)
        return slips[fact]

    solution = solve(question, recall)
    return Demonstration(question, solution, tuple(slips.items()))


# --- the task --------------------------------------------------------------------------------------------------------


class Science(SplitTask):
    """The embedded science task: train and `id` share their compositions, those of `ood` are unseen.

    `id` and `ood` hold questions that the training split does not contain.

    Args:
        train: number of training questions.
        id: number of held-out questions of the training distribution.
        ood: number of held-out questions with unseen compositions.
        seed: which questions are drawn.
        ood_kind: `untrained`: `ood` holds a part of the training compositions (`Problem.untrained`), which `train` and
            `id` then lack.
    """

    name = "science"

    def __init__(
        self, train: int = 4096, id: int = 256, ood: int = 256, seed: int = 0, ood_kind: OodKind = "unseen"
    ) -> None:
        trained, other = (Question.draw, unseen) if ood_kind == "unseen" else (trained_only, untrained)
        self._splits = {
            "train": draw_examples(train, trained, held_out=False, seed=f"train {seed}"),
            "id": draw_examples(id, trained, held_out=True, seed=f"id {seed}"),
            "ood": draw_examples(ood, other, held_out=True, seed=f"ood {seed}"),
        }

    def final_answer(self, text: str) -> str | None:
        return parse_answer(text)

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """1.0 where the completion ends in its only `#answer` and that agrees with the column `answer`, else 0.0."""
        del prompts, completion_ids
        return [
            float(agrees(parse_answer(completion), answer, kind))
            for completion, answer, kind in zip(completions, columns["answer"], columns["kind"], strict=True)
        ]


Draw = Callable[[random.Random], Question]


def unseen(rng: random.Random) -> Question:
    """Draw a question whose composition does not belong to the training distribution."""
    return Question.draw(rng, ood=True)


def trained_only(rng: random.Random) -> Question:
    """Draw one whose composition is not kept from training."""
    return next(question for question in iter(lambda: Question.draw(rng), None) if not question.problem.untrained)


def untrained(rng: random.Random) -> Question:
    """Draw one whose composition is."""
    return next(question for question in iter(lambda: Question.draw(rng), None) if question.problem.untrained)


def draw_examples(count: int, draw: Draw, held_out: bool, seed: str) -> tuple[Example, ...]:
    """Draw `count` different questions, held out or not."""
    questions = draw_split(draw, count, held_out, seed, "science")
    return tuple(
        Example(
            id=question.id,
            prompt=[{"role": "user", "content": question.text}],
            columns={"answer": question.answer, "kind": question.problem.kind},
        )
        for question in questions
    )
