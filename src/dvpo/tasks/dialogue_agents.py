"""Agents for `dvpo.tasks.dialogue`: one that is always right, and a flawed demonstrator.

    expert           the oracle; it reads the conversation as a model does and nothing else: that it scores 1 on every
                     goal shows that whatever is needed is said
    demonstrate      a conversation of the expert with *systematic* slips, to be imitated by a warm start

The demonstrator does not hear changes of mind of certain slots, and takes the value of certain slots for granted
instead of asking; which slots, and how often, is fixed by hash. A model that imitates it fails where it fails, and
often enough does right for a reward to find out. A slip that is unlearnt with one goal is unlearnt with all goals of
that slot.
"""

import random
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import NamedTuple

from dvpo.seeding import derive_uniform
from dvpo.tasks import Environment, Message
from dvpo.tasks.dialogue import Conversation
from dvpo.tasks.dialogue_goals import SEEN, Goal, draw_goal

FLAWED_SHARE = 0.5
FLAW_PROBABILITIES = (0.35, 0.85)

Agent = Callable[[Sequence[Message]], str]
"""Reads the conversation so far and says the next turn."""


class Slip(NamedTuple):
    """A failing of the demonstrator with a slot.

    `change`: it does not hear a change of mind; `ask`: it takes the schema's first value for granted.
    """

    kind: str
    slot: str


def converse(environment: Environment, agent: Agent) -> list[Message]:
    """Let an agent talk to an environment to the end; the whole conversation, prompt included."""
    prompt = environment.reset()
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    done = False
    while not done:
        turn = agent(messages)
        replies, _, done = environment.step(turn)
        messages += [{"role": "assistant", "content": turn}, *replies]
    return messages


class Schema(NamedTuple):
    verb: str
    slots: dict[str, list[str]]
    attribute: str
    key: str


def read_schema(text: str) -> Schema:
    """Read what `Goal.schema_text` wrote."""
    verb, *slots, question = text.split(";")
    attribute, _, key = question.partition("/")
    return Schema(verb, {slot: values.split(",") for slot, values in (s.split(":") for s in slots)}, attribute, key)


def expert(messages: Sequence[Message], slips: Collection[Slip] = ()) -> str:
    """The right next turn: note what is new, ask for what is missing, answer the question, act; or slip."""
    verb, slots, attribute, key = read_schema(messages[0]["content"])
    known = {slot: values[0] for slot, values in slots.items() if Slip("ask", slot) in slips}
    news: dict[str, str] = {}
    fact, question = "", False
    for message in messages[1:]:
        content = message["content"]
        if message["role"] == "assistant":
            news = {}
            question &= f"tell {attribute}=" not in content
            continue
        for item in content.split(";"):
            name, _, value = item.removeprefix("no ").partition("=")
            if name == attribute:
                fact = value
            elif name == f"{attribute}?":
                question = True
            elif name in slots and not (item.startswith("no ") and Slip("change", name) in slips):
                known[name] = news[name] = value
    notes = "".join(f"{slot}={news[slot]};" for slot in slots if slot in news)
    missing = [slot for slot in slots if slot not in known]
    if missing:
        return f"{notes}ask {missing[0]}"
    if question:
        return f"{notes}tell {attribute}={fact}" if fact else f"{notes}look {key}={known[key]}"
    # The action repeats every value: notes would say nothing more.
    return f"{verb} " + ";".join(f"{slot}={known[slot]}" for slot in slots)


@cache
def slip_probability(slip: Slip) -> float:
    """How often the demonstrator slips where it can; 0 for the slots that it has no trouble with."""
    if derive_uniform("flawed", *slip) >= FLAWED_SHARE:
        return 0.0
    low, high = FLAW_PROBABILITIES
    return low + (high - low) * derive_uniform("flaw", *slip)


class Demonstration(NamedTuple):
    """One conversation of the demonstrator."""

    goal: Goal
    messages: tuple[Message, ...]
    """All of it, the prompt included, as a chat template takes it."""
    slips: tuple[Slip, ...]
    """Where the demonstrator slipped."""


def demonstrate(goal: Goal, rng: random.Random) -> Demonstration:
    """Hold the conversation as the flawed demonstrator does."""
    occasions = [Slip("change", goal.change[0]), *(Slip("ask", slot) for slot in goal.missing)]
    slips = tuple(slip for slip in occasions if rng.random() < slip_probability(slip))
    messages = converse(Conversation(goal), lambda so_far: expert(so_far, slips))
    return Demonstration(goal, tuple(messages), slips)


def draw_demonstration(rng: random.Random) -> Demonstration:
    """Draw a goal of a seen domain that is not held out, and the demonstrator's conversation about it."""
    while True:
        goal = draw_goal(SEEN, rng)
        if not goal.held_out:
            return demonstrate(goal, rng)
