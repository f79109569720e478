"""Agents to be beaten in a dialogue, and what an episode is worth by its turns alone."""

import re

from dvpo.tasks.dialogue import Conversation
from dvpo.tasks.dialogue_agents import read_schema


def turns_of(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


def replay(goal, turns):
    """The figures of an episode from its goal and the agent's turns, since the same turns meet the same replies."""
    conversation = Conversation(goal)
    for turn in turns:
        if conversation.step(turn).done:
            break
    return conversation.metrics


def silent(messages):
    del messages
    return ""


def random_agent(rng):
    """An agent that mixes sense and nonsense: words of the conversation in acts right and wrong, and stray text."""

    def agent(messages):
        verb, slots, _, _ = read_schema(messages[0]["content"])
        words = re.findall("[a-z0-9]+", " ".join(message["content"] for message in messages))

        def pairs(count):
            return ";".join(f"{rng.choice(words)}={rng.choice(words)}" for _ in range(count))

        turns = (
            "ask " + rng.choice([*slots, rng.choice(words)]),
            f"{rng.choice(('look', 'tell', 'ask', verb))} {pairs(rng.randint(0, 4))}",
            f"{verb} " + ";".join(f"{slot}={rng.choice(values)}" for slot, values in slots.items()),
            f"{rng.choice(words)} {rng.choice(words)}",
            "".join(chr(rng.randrange(0x300)) for _ in range(rng.randrange(60))),
        )
        notes = f"{pairs(1)};" * rng.randrange(3)
        return notes + rng.choice(turns)

    return agent
