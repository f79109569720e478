"""What the users of `dvpo.tasks.dialogue` want: five domains, and goals drawn from them.

A goal shows a *part* of its domain: three of its five slots, each with three of its six values, in an order of its
own, and a small database of its own. A model that only knows the domain by heart does not get far: it has to read the
schema, and that is what carries over to domains that it has never seen.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from dvpo.seeding import derive_seed, derive_uniform

HELD_OUT_SHARE = 0.25
SLOTS_SHOWN = 3
VALUES_SHOWN = 3


class Domain(NamedTuple):
    """A service: the verb of its final action, what can be asked about it, and its slots with their values."""

    verb: str
    attributes: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]


def domain(verb: str, attributes: str, **slots: str) -> Domain:
    return Domain(verb, tuple(attributes.split()), {name: tuple(values.split()) for name, values in slots.items()})


SEEN = {
    "life": domain(
        "order",
        "cost wait",
        dish="soup rice fish cake stew taco",
        cup="cola milk juice beer water cocoa",
        place="home desk gate yard roof hall",
        spice="mild warm hot plain salty sweet",
        box="paper foil glass wood steel jute",
    ),
    "transport": domain(
        "ride",
        "fare mins",
        city="rome oslo bonn lyon bern kyiv",
        day="mon tue wed thu fri sat",
        seat="aisle front back left right upper",
        by="bus rail tram ferry taxi plane",
        bag="zero one two three four five",
    ),
    "health": domain(
        "visit",
        "fee queue",
        doc="eye skin heart bone ear tooth",
        who="self son wife dad mum baby",
        time="8am 9am 11am 2pm 3pm 5pm",
        room="a1 a2 b1 b2 c1 c2",
        plan="gold iron zinc lead tin ruby",
    ),
}
"""The domains of the warm start, of training and of the split `id`."""

UNTRAINED = {"health": SEEN["health"]}
"""The domain of `ood` where `task.ood` is `untrained`: the warm start has met it, training has not."""

TRAINED = {name: domain for name, domain in SEEN.items() if name not in UNTRAINED}
"""The domains of training and of `id` in that case."""

UNSEEN = {
    "social": domain(
        "invite",
        "dues crowd",
        guest="ana bob kim leo mia zoe",
        event="chess film choir quiz hike gala",
        spot="park beach cafe pier dock zoo",
        week="w1 w2 w3 w4 w5 w6",
        gift="rose book wine card lamp vase",
    ),
    "finance": domain(
        "pay",
        "rate tax",
        payee="acme bolt dyne flux gyro hexa",
        sum="10 20 50 100 200 500",
        coin="usd eur gbp jpy chf sek",
        acct="main joint spare youth trust cash",
        term="now eod eom q1 q2 q3",
    ),
}
"""The domains of the split `ood`: no verb, attribute, slot or value of theirs occurs in a seen one."""


@dataclass(frozen=True)
class Goal:
    """What one user wants, and when the user says it."""

    domain: str
    verb: str
    schema: Mapping[str, tuple[str, ...]]
    """The slots, all of them required, and the values that each may take."""
    wishes: Mapping[str, str]
    """The value of each slot that the user wants at first."""
    given: tuple[str, ...]
    """The slots that the user names unasked, in the opening; the others are *missing*."""
    change: tuple[str, str]
    """The change of mind: a given slot and its new value."""
    change_at: int
    """The user's reply that voices it, counted from 1."""
    attribute: str
    """What the user's question is about."""
    key: str
    """The slot that the attribute depends on."""
    facts: Mapping[str, int]
    """The database: the attribute for each value of `key`."""
    question_at: int
    """The user's reply that asks the question; 0: the opening does."""

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits, a hash of all that the goal says: the same on every machine."""
        return f"{derive_seed('dialogue', json.dumps(asdict(self))):016x}"

    @property
    def held_out(self) -> bool:
        """Whether the goal is kept for evaluation: its hash alone decides."""
        return derive_uniform("held out", self.id) < HELD_OUT_SHARE

    @property
    def missing(self) -> tuple[str, ...]:
        """The slots that the agent has to ask for."""
        return tuple(slot for slot in self.schema if slot not in self.given)

    @property
    def wanted(self) -> dict[str, str]:
        """What the user wants in the end."""
        return {**self.wishes, **dict([self.change])}

    @property
    def schema_text(self) -> str:
        """The schema as the agent reads it: `ride;city:rome,oslo,bonn;day:mon,tue,wed;seat:left,back,aisle;fare/day`.

        The last part says that the fare depends on the day.
        """
        slots = (f"{slot}:{','.join(values)}" for slot, values in self.schema.items())
        return ";".join((self.verb, *slots, f"{self.attribute}/{self.key}"))


def draw_goal(domains: Mapping[str, Domain], rng: random.Random) -> Goal:
    """Draw a goal with one or two missing slots out of three, one change of mind and one question.

    Both are voiced before an agent that asks for all missing slots runs out of slots to ask for, so whatever the
    order of its questions, nothing is kept from it.
    """
    name = rng.choice(list(domains))
    verb, attributes, slots = domains[name]
    schema = {slot: tuple(rng.sample(slots[slot], VALUES_SHOWN)) for slot in rng.sample(list(slots), SLOTS_SHOWN)}
    wishes = {slot: rng.choice(values) for slot, values in schema.items()}
    missing = rng.randint(1, 2)
    given = tuple(rng.sample(list(schema), SLOTS_SHOWN - missing))
    changed, key = rng.choice(given), rng.choice(list(schema))
    return Goal(
        domain=name,
        verb=verb,
        schema=schema,
        wishes=wishes,
        given=given,
        change=(changed, rng.choice([value for value in schema[changed] if value != wishes[changed]])),
        change_at=rng.randint(1, missing),
        attribute=rng.choice(attributes),
        key=key,
        facts=dict(zip(schema[key], rng.sample(range(10, 100), VALUES_SHOWN), strict=True)),
        question_at=rng.randint(0, missing),
    )
