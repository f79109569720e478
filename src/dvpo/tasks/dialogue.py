"""Slot filling against a simulated user: the agent asks, looks up, answers and acts, turn by turn.

    system     ride;city:rome,oslo,bonn;day:mon,tue,wed;seat:left,back,aisle;fare/day
    user       day=mon
    assistant  day=mon;ask city
    user       city=oslo;fare?
    assistant  city=oslo;ask seat
    user       seat=back;no day=tue
    assistant  day=tue;seat=back;look day=tue
    tool       fare=42
    assistant  tell fare=42
    user       ok
    assistant  ride city=oslo;day=tue;seat=back

The user is agenda-based (Schatzmann et al. 2007): a goal with slots, one question and one change of mind
(`dvpo.tasks.dialogue_goals`), and a fixed order of saying them. A turn of the agent is one act, `ask SLOT`,
`look SLOT=VALUE`, `tell ATTRIBUTE=VALUE` or the final `VERB SLOT=VALUE;...`, and before it any number of notes
`SLOT=VALUE;`, with which it records what it has understood. A tool answers `look` and refuses (`error`) a final action
that the schema does not allow; the user answers all else, with `?` to what it does not understand. An accepted final
action writes one row into the database and ends the episode; so does turn 6.

The paper (arXiv 2512.03847) reports TCR, ACR and GCR without defining them. **The definitions here are ours**, and
figures of the two must not be compared:

    TCR  1 if a final action with all required arguments, allowed by the schema, came within 6 turns
    ACR  missing slots that the agent asked for and recorded correctly / missing slots
    GCR  1 if the final database equals the oracle's and the user's question was answered;  GCR <= TCR

The domains are the paper's five, too: three are seen in training, two only in the split `ood`. The language is terse
and coded so that a byte-level model of 165,000 parameters with 512 positions can learn it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dvpo.tasks import Environment, Example, Message, OodKind, Prompt, Reward, SplitTask, Step
from dvpo.tasks.dialogue_goals import SEEN, TRAINED, UNSEEN, UNTRAINED, Domain, Goal, draw_goal
from dvpo.tasks.splits import draw_split

DIALOGUE_VERSION = 1
"""Raised when goals, user, grammar or demonstrations change, so that no cached warm start outlives its task."""

MOST_TURNS = 6


class Metrics(NamedTuple):
    """The figures of one episode, each in [0, 1]; the module says what they mean."""

    tcr: float
    acr: float
    gcr: float

    @property
    def mean(self) -> float:
        return (self.tcr + self.acr + self.gcr) / 3


class Act(NamedTuple):
    """One turn of the agent, as it was understood."""

    notes: Sequence[tuple[str, str]]
    verb: str
    pairs: Sequence[tuple[str, str]]
    """Arguments `name=value`; the value is empty where only a name stands (`ask city`)."""


TURN = re.compile(r"((?:[a-z]+=[a-z0-9]+;)*)([a-z]+) ([a-z]+|[a-z]+=[a-z0-9]+(?:;[a-z]+=[a-z0-9]+)*)")
PAIR = re.compile(r"([a-z]+)=?([a-z0-9]*)")


def parse_turn(text: str) -> Act | None:
    """Read a turn of the agent, white space around it aside; None if it breaks the grammar."""
    match = TURN.fullmatch(text.strip())
    return Act(PAIR.findall(match[1]), match[2], PAIR.findall(match[3])) if match else None


class User:
    """Says what it wants: the answer to the agent's act first, then what its agenda holds for this reply."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.wishes = dict(goal.wishes)
        """What the user wants now."""
        self.replies = 0
        self.asked_for: set[str] = set()
        """Slots whose value the agent asked for."""
        self.wants_to_know = False
        """Whether the question has been asked."""
        self.answered = False
        """Whether the last answer to the question was right, for what the user wanted when it was given."""

    def opening(self) -> str:
        return ";".join([*(f"{slot}={self.wishes[slot]}" for slot in self.goal.given), *self._agenda()])

    def reply(self, act: Act | None) -> str:
        self.replies += 1
        return ";".join([self._answer(act), *self._agenda()])

    def _answer(self, act: Act | None) -> str:
        if act is None or len(act.pairs) != 1:
            return "?"
        ((name, value),) = act.pairs
        if act.verb == "ask" and name in self.wishes and not value:
            self.asked_for.add(name)
            return f"{name}={self.wishes[name]}"
        if act.verb == "tell" and name == self.goal.attribute and self.wants_to_know:
            self.answered = value == str(self.goal.facts[self.wishes[self.goal.key]])
            return "ok"  # the user cannot know better
        return "?"

    def _agenda(self) -> list[str]:
        items = []
        if self.replies == self.goal.change_at:
            slot, value = self.goal.change
            self.wishes[slot] = value
            items.append(f"no {slot}={value}")
        if self.replies == self.goal.question_at:
            self.wants_to_know = True
            items.append(f"{self.goal.attribute}?")
        return items


class Conversation:
    """One episode, an `Environment`: a user, a database, and the record of what the agent did.

    Args:
        goal: what the user wants.
    """

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.reset()

    def reset(self) -> Prompt:
        """Begin anew: the schema as the system's message, then the user's opening."""
        self.user = User(self.goal)
        self.database: list[tuple[str, dict[str, str]]] = []
        """Rows written by final actions: (verb, arguments)."""
        self.recorded: dict[str, str] = {}
        self.turns = 0
        return [
            {"role": "system", "content": self.goal.schema_text},
            {"role": "user", "content": self.user.opening()},
        ]

    def step(self, response: str) -> Step:
        """Take one turn of the agent; over after an accepted final action or the last turn."""
        self.turns += 1
        act = parse_turn(response)
        if act is not None:
            self.recorded.update(act.notes)
        reply = self._reply(act)
        done = bool(self.database) or self.turns == MOST_TURNS
        return Step(() if done else (reply,), self.metrics.mean if done else None, done)

    @property
    def metrics(self) -> Metrics:
        """The figures as they would be if the episode ended here."""
        goal, user = self.goal, self.user
        right = [s for s in goal.missing if s in user.asked_for and self.recorded.get(s) == user.wishes[s]]
        reached = self.database == [(goal.verb, goal.wanted)] and user.answered
        return Metrics(float(bool(self.database)), len(right) / len(goal.missing), float(reached))

    def figures(self) -> dict[str, float]:
        """The metrics, as evaluations report them."""
        return self.metrics._asdict()

    def _reply(self, act: Act | None) -> Message:
        """Let the database or the user answer."""
        if act is not None and act.verb == self.goal.verb:
            if not self._allowed(act.pairs):
                return {"role": "tool", "content": "error"}
            self.database.append((act.verb, dict(act.pairs)))
            self.recorded.update(act.pairs)
            return {"role": "tool", "content": "done"}  # which nobody hears: the episode is over
        if act is not None and act.verb == "look":
            return {"role": "tool", "content": self._look_up(act.pairs)}
        return {"role": "user", "content": self.user.reply(act)}

    def _allowed(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether every slot of the schema has one of its values, once, and nothing else is there."""
        schema = self.goal.schema
        return sorted(slot for slot, _ in pairs) == sorted(schema) and all(v in schema[slot] for slot, v in pairs)

    def _look_up(self, pairs: Sequence[tuple[str, str]]) -> str:
        known = len(pairs) == 1 and pairs[0][0] == self.goal.key and pairs[0][1] in self.goal.facts
        return f"{self.goal.attribute}={self.goal.facts[pairs[0][1]]}" if known else "error"


class SlotFilling(SplitTask):
    """The embedded dialogue task: train and `id` are goals of three domains, `ood` those of two unseen ones.

    The reward, the mean of TCR, ACR and GCR, comes from the environment's last step. `true_reward` adds 0: an episode
    that the length limit cuts has earned nothing.

    Args:
        train: number of training goals.
        id: number of held-out goals of the training domains.
        ood: number of goals of the unseen domains.
        seed: which goals are drawn.
        ood_kind: `untrained`: `ood` holds goals of `UNTRAINED`, a domain that the warm start has met, and `train` and
            `id` those of the other two.

    Raises:
        InputError: a size out of range.
    """

    name = "dialogue"

    def __init__(
        self, train: int = 4096, id: int = 256, ood: int = 256, seed: int = 0, ood_kind: OodKind = "unseen"
    ) -> None:
        trained, other = (SEEN, UNSEEN) if ood_kind == "unseen" else (TRAINED, UNTRAINED)
        goals = {
            "train": draw_goals(train, trained, held_out=False, seed=f"train {seed}"),
            "id": draw_goals(id, trained, held_out=True, seed=f"id {seed}"),
            "ood": draw_goals(ood, other, held_out=True, seed=f"ood {seed}"),
        }
        self._goals = {goal.id: goal for part in goals.values() for goal in part}
        self._splits = {name: tuple(map(as_example, part)) for name, part in goals.items()}

    def goal(self, example: Example) -> Goal:
        """The goal behind an example."""
        return self._goals[example.id]

    def environment(self, example: Example) -> Environment:
        return Conversation(self.goal(example))

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """0.0 for each: what the conversation earned is in its steps; an unfinished one has failed, and that is known.

        None would be wrong: it would withhold unfinished episodes from learning.
        """
        del completions, completion_ids, columns
        return [0.0] * len(prompts)


def as_example(goal: Goal) -> Example:
    """The goal as an example; reward functions are given its `domain` and what is `wanted` in the end."""
    return Example(goal.id, Conversation(goal).reset(), {"domain": goal.domain, "wanted": goal.wanted})


def draw_goals(count: int, domains: Mapping[str, Domain], held_out: bool, seed: str) -> tuple[Goal, ...]:
    """Draw `count` different goals, held out or not."""
    return draw_split(lambda rng: draw_goal(domains, rng), count, held_out, seed, "dialogue")
