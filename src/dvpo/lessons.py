"""What the warm starts imitate: for each embedded task its demonstrations, labelled as the checker sees them.

The dial `checker` says how much the checker knows: the share of slips (chosen by hash of the mislearnt fact, or in a
dialogue of the failing and its slot) that it can see. A slip that it cannot see goes unnoticed: a demonstration counts
as good if those that are seen, alone, would have led to a right end. At 1 the labels are the truth; at 0 every label
is "good", which teaches nothing at the same cost. Turning the dial up makes no seen slip unseen.

No demonstration is of a held-out question or goal.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dvpo.seeding import derive_uniform
from dvpo.tasks import Message, Task, dialogue, dialogue_agents, math, science
from dvpo.tasks.science_facts import believing


class Demonstrated(NamedTuple):
    """A conversation to imitate: whatever the assistant says in it is learnt, whatever others say is not."""

    messages: Sequence[Message]
    good: bool
    """Whether it ends well, as the checker sees it."""


@dataclass(frozen=True)
class Source:
    """Where a task's warm start gets its lessons from."""

    version: int
    """Of the task: a model does not outlive what it learnt."""
    make_task: Callable[[], Task]
    """The task that the finished model is measured by."""
    draw: Callable[[random.Random, bool, float], Demonstrated]
    """`draw(rng, easy, checker)`; `easy` in the first fifth of the steps."""
    length: Callable[[Demonstrated], int]
    """By which lessons are sorted, so that those of one batch are of like length and little is padded."""
    steps: int = 1200
    batch_size: int = 128
    """The training that it takes."""


# --- math ------------------------------------------------------------------------------------------------------------

EASY_MIX = (0.4, 0.4, 0.2)
FULL_MIX = (0.1, 0.3, 0.3, 0.1, 0.1, 0.1)
"""Shares of chains with 1, 2, 3, ... operations: facts are learnt fastest on short chains, so they come first.
Chains as long as the task's `ood` are among them (never its questions): reinforcement learning, not the warm start,
sees short chains only."""


def draw_math(rng: random.Random, easy: bool, checker: float) -> Demonstrated:
    """Draw a chain, and the demonstrator's solution of it."""
    mix = EASY_MIX if easy else FULL_MIX
    while True:
        (operations,) = rng.choices(range(1, len(mix) + 1), mix)
        question = math.Question.draw(operations, rng)
        if not question.held_out:
            return math_lesson(math.demonstrate(question, rng), checker)


def math_lesson(demonstration: math.Demonstration, checker: float) -> Demonstrated:
    """Good if the errors cancel, or are none, among those facts that the checker knows."""
    seen = [error for fact, error in demonstration.slips if math.hash_share(f"checked {fact}") < checker]
    return question_and_answer(demonstration.question.text, demonstration.solution, sum(seen) == 0)


# --- science ---------------------------------------------------------------------------------------------------------


def draw_science(rng: random.Random, easy: bool, checker: float) -> Demonstrated:
    """Draw a question of the training compositions, at first without options, and the demonstrator's solution of it."""
    while True:
        question = science.Question.draw(rng)
        if not question.held_out and not (easy and question.options):
            return science_lesson(science.demonstrate(question, rng), checker)


def science_lesson(demonstration: science.Demonstration, checker: float) -> Demonstrated:
    """Good if somebody with the seen wrong beliefs, and no other, would find the right answer."""
    question = demonstration.question
    seen = {fact: wrong for fact, wrong in demonstration.slips if derive_uniform("checked", fact) < checker}
    answer = science.parse_answer(science.solve(question, believing(seen)))
    good = science.agrees(answer, question.answer, question.problem.kind)
    return question_and_answer(question.text, demonstration.solution, good)


# --- dialogue --------------------------------------------------------------------------------------------------------


def draw_dialogue(rng: random.Random, easy: bool, checker: float) -> Demonstrated:
    """Draw a goal of a seen domain, and the demonstrator's conversation about it."""
    del easy  # there is no easier half
    return dialogue_lesson(dialogue_agents.draw_demonstration(rng), checker)


def dialogue_lesson(demonstration: dialogue_agents.Demonstration, checker: float) -> Demonstrated:
    """Good if the expert with the seen slips, and no other, would earn the whole reward."""
    seen = [slip for slip in demonstration.slips if derive_uniform("checked", *slip) < checker]
    conversation = dialogue.Conversation(demonstration.goal)
    dialogue_agents.converse(conversation, lambda so_far: dialogue_agents.expert(so_far, seen))
    return Demonstrated(demonstration.messages, min(conversation.metrics) == 1)


# --- all of them -----------------------------------------------------------------------------------------------------


def question_and_answer(question: str, answer: str, good: bool) -> Demonstrated:
    """The conversation of a single-turn task."""
    return Demonstrated(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), good)


def whole_length(demonstrated: Demonstrated) -> int:
    """All that is said, in characters."""
    return sum(len(message["content"]) for message in demonstrated.messages)


def answer_length(demonstrated: Demonstrated) -> int:
    """The last word, in characters."""
    return len(demonstrated.messages[-1]["content"])


SOURCES: Mapping[str, Source] = {
    # Another length would do as well, but would train other models than the shipped ones.
    "math": Source(math.TASK_VERSION, math.ChainArithmetic, draw_math, answer_length),
    "science": Source(science.TASK_VERSION, science.Science, draw_science, whole_length, steps=6000),
    "dialogue": Source(
        dialogue.DIALOGUE_VERSION, dialogue.SlotFilling, draw_dialogue, whole_length, steps=2500, batch_size=32
    ),
}
"""Every task with an embedded model."""
