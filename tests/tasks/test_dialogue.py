"""The dialogue task: the user, the metrics and the agents."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialogues import random_agent, replay, silent, turns_of
from dvpo.embedded import make_tokenizer
from dvpo.encoding import ChatEncoder
from dvpo.errors import InputError
from dvpo.loading import TASK_DEFAULTS
from dvpo.tasks import Task
from dvpo.tasks.dialogue import MOST_TURNS, Conversation, SlotFilling, parse_turn
from dvpo.tasks.dialogue_agents import (
    Slip,
    converse,
    demonstrate,
    draw_demonstration,
    expert,
    read_schema,
    slip_probability,
)
from dvpo.tasks.dialogue_goals import SEEN, UNSEEN, Goal, draw_goal
from dvpo.tasks.named import make_task

TASK = SlotFilling(train=300, id=60, ood=60)
SPLITS = ("train", "id", "ood")
GOALS = [TASK.goal(example) for name in SPLITS for example in TASK.split(name)]
ENCODER = ChatEncoder(make_tokenizer())

goals = st.integers(0, 2**32).map(lambda seed: draw_goal(SEEN | UNSEEN, random.Random(seed)))

RIDE = Goal(
    domain="transport",
    verb="ride",
    schema={
        "city": ("rome", "oslo", "bonn"),
        "day": ("mon", "tue", "wed"),
        "seat": ("left", "back", "aisle"),
    },
    wishes={"city": "oslo", "day": "mon", "seat": "back"},
    given=("day",),
    change=("day", "tue"),
    change_at=2,
    attribute="fare",
    key="day",
    facts={"mon": 17, "tue": 42, "wed": 88},
    question_at=1,
)


def said(messages):
    return [(message["role"], message["content"]) for message in messages]


def played(goal, agent):
    """The conversation of an agent about a goal, and its environment afterwards."""
    conversation = Conversation(goal)
    return converse(conversation, agent), conversation


def wavering(rng, share):
    """An agent that does the right thing, but for a share of its turns anything."""
    return lambda so_far: random_agent(rng)(so_far) if rng.random() < share else expert(so_far)


def rewards(goal, turns):
    conversation = Conversation(goal)
    return [conversation.step(turn).reward for turn in turns]


# Goals and splits


def test_unseen_domains_share_no_slot_verb_attribute_or_value_with_seen_ones():
    def names(domains):
        slots = {slot for domain in domains.values() for slot in domain.slots}
        values = {value for domain in domains.values() for part in domain.slots.values() for value in part}
        others = {word for domain in domains.values() for word in (domain.verb, *domain.attributes)}
        assert not others & slots
        return slots, slots | values | others

    (seen_slots, seen), (unseen_slots, unseen) = names(SEEN), names(UNSEEN)
    assert (len(SEEN), len(seen_slots), len(UNSEEN), len(unseen_slots)) == (3, 15, 2, 10)
    assert not seen & unseen
    shown = {name: {slot for e in TASK.split(name) for slot in TASK.goal(e).schema} for name in SPLITS}
    assert shown == {"train": seen_slots, "id": seen_slots, "ood": unseen_slots}


def test_an_untrained_domain_is_one_of_the_warm_starts_and_no_other_goal_is_of_it():
    task = SlotFilling(train=300, id=60, ood=60, ood_kind="untrained")
    domains = {name: {task.goal(e).domain for e in task.split(name)} for name in SPLITS}
    assert domains["train"] == domains["id"]
    assert not domains["id"] & domains["ood"]
    assert domains["id"] | domains["ood"] == set(SEEN)
    assert not any(task.goal(e).held_out for e in task.split("train"))
    assert all(task.goal(e).held_out for name in ("id", "ood") for e in task.split(name))


def test_splits_have_the_sizes_asked_for_and_held_out_goals_are_never_trained_on_whatever_the_seed():
    for task in (TASK, SlotFilling(train=300, id=60, ood=60, seed=1)):
        ids = [e.id for name in SPLITS for e in task.split(name)]
        assert [len(task.split(name)) for name in SPLITS] == [300, 60, 60]
        assert len(set(ids)) == 420
        assert not any(task.goal(e).held_out for e in task.split("train"))
        assert all(task.goal(e).held_out for e in task.split("id"))
        assert task.split("no such split") == ()
    assert {e.id for e in task.split("train")} != {e.id for e in TASK.split("train")}


def test_a_goal_has_its_id_and_its_conversation_the_same_everywhere():
    assert RIDE.id == "327407fe033ff84e"
    assert TASK.split("train")[0].id == SlotFilling(train=1, id=0, ood=0).split("train")[0].id
    assert said(converse(Conversation(RIDE), expert)) == [
        ("system", "ride;city:rome,oslo,bonn;day:mon,tue,wed;seat:left,back,aisle;fare/day"),
        ("user", "day=mon"),
        ("assistant", "day=mon;ask city"),
        ("user", "city=oslo;fare?"),
        ("assistant", "city=oslo;ask seat"),
        ("user", "seat=back;no day=tue"),
        ("assistant", "day=tue;seat=back;look day=tue"),
        ("tool", "fare=42"),
        ("assistant", "tell fare=42"),
        ("user", "ok"),
        ("assistant", "ride city=oslo;day=tue;seat=back"),
    ]


def test_a_bad_size_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="split of 1000000"):
        SlotFilling(train=1_000_000)


def test_the_schema_that_is_written_is_the_one_that_is_read():
    verb, slots, attribute, key = read_schema(RIDE.schema_text)
    assert (verb, attribute, key) == ("ride", "fare", "day")
    assert {slot: tuple(values) for slot, values in slots.items()} == RIDE.schema


# The grammar


@pytest.mark.parametrize(
    ("text", "understood"),
    [
        ("ask city", ([], "ask", [("city", "")])),
        (" tell fare=42\n", ([], "tell", [("fare", "42")])),
        ("a=1;b=2;ride c=3;d=4", ([("a", "1"), ("b", "2")], "ride", [("c", "3"), ("d", "4")])),
        ("", None),
        ("ask", None),
        ("ask ", None),
        ("ask  city", None),
        ("ask city;day", None),
        ("city=oslo", None),
        ("city=oslo;", None),
        ("ride city=oslo;", None),
        ("ride city=", None),
        ("ask city\nask day", None),
        ("Ask city", None),
        ("ask ci\u0442y", None),
        ("a=1;" * 50_000, None),
        ("a" * 200_000, None),
    ],
)
def test_a_turn_is_one_act_with_notes_before_it_and_nothing_else(text, understood):
    assert parse_turn(text) == understood


# The user


def test_the_user_answers_before_it_goes_on_with_its_agenda_and_does_not_pretend_to_understand():
    conversation = Conversation(RIDE)
    replies = [
        said(conversation.step(turn).messages) for turn in ("hello", "tell fare=1", "ask seat", "ask moon", "look sun")
    ]
    # The first two replies carry the agenda: the question at 1, the change of mind at 2.
    assert replies == [
        [("user", "?;fare?")],
        [("user", "ok;no day=tue")],
        [("user", "seat=back")],
        [("user", "?")],
        [("tool", "error")],
    ]


@given(goals, st.integers(0, 2**32))
def test_whatever_the_order_of_its_questions_an_agent_that_asks_them_all_hears_all(goal, seed):
    conversation = Conversation(goal)
    for slot in random.Random(seed).sample(goal.missing, len(goal.missing)):
        conversation.step(f"ask {slot}")
    assert conversation.user.wants_to_know
    assert conversation.user.wishes == goal.wanted
    conversation.step(f"tell {goal.attribute}={goal.facts[goal.wanted[goal.key]]}")
    assert conversation.step(f"{goal.verb} " + ";".join(f"{s}={v}" for s, v in goal.wanted.items())).reward == 1
    assert conversation.metrics == (1, 1, 1)


@given(goals)
def test_the_change_of_mind_is_honoured_and_whoever_misses_it_misses_the_goal(goal):
    slot, value = goal.change
    assert slot in goal.given
    assert value != goal.wishes[slot]
    messages, conversation = played(goal, expert)
    assert conversation.database == [(goal.verb, {**goal.wishes, slot: value})]
    assert sum(f"no {slot}={value}" in m["content"].split(";") for m in messages) == 1
    deaf, conversation = played(goal, lambda so_far: expert(so_far, {Slip("change", slot)}))
    assert conversation.database == [(goal.verb, goal.wishes)]
    assert conversation.metrics == (1, 1, 0)
    assert len(deaf) == len(messages)


@given(goals)
def test_the_question_has_to_be_answered_with_the_fact_of_the_value_wanted_when_it_is(goal):
    right = goal.facts[goal.wanted[goal.key]]
    turns = turns_of(played(goal, expert)[0])
    for answer in [*goal.facts.values(), 0]:
        retold = [f"tell {goal.attribute}={answer}" if "tell " in turn else turn for turn in turns]
        assert replay(goal, retold).gcr == (answer == right)
    unanswered = [turn for turn in turns if "tell " not in turn]
    assert replay(goal, unanswered) == (1, 1, 0)


def test_an_answer_before_the_question_is_none():
    turns = ["tell fare=17", "ask city", "ask seat", "ride city=oslo;day=tue;seat=back"]
    assert replay(RIDE, turns) == (1, 1, 0)
    assert replay(RIDE, [*turns[1:3], "tell fare=42", turns[3]]) == (1, 1, 1)


def test_the_last_answer_counts():
    asked, action = ["ask city", "ask seat"], "ride city=oslo;day=tue;seat=back"
    assert replay(RIDE, [*asked, "tell fare=17", "tell fare=42", action]).gcr == 1
    assert replay(RIDE, [*asked, "tell fare=42", "tell fare=17", action]).gcr == 0


# Final actions and metrics


@pytest.mark.parametrize(
    "action",
    [
        "ride city=oslo;day=tue",  # a required argument lacks
        "ride city=oslo;day=tue;day=tue",
        "ride city=oslo;day=tue;seat=back;seat=back",
        "ride city=oslo;day=tue;seat=back;bag=one",  # a slot of the domain, but not of this schema
        "ride city=oslo;day=tue;seat=right",  # a value of the domain, but not of this schema
        "ride city=tue;day=oslo;seat=back",
        "order city=oslo;day=tue;seat=back",
        "ride city",
    ],
)
def test_a_final_action_that_the_schema_does_not_allow_is_rejected_and_leaves_no_trace(action):
    conversation = Conversation(RIDE)
    for turn in ("ask city", "ask seat"):
        conversation.step(turn)
    step = conversation.step(action)
    assert not step.done
    assert said(step.messages) == [("tool", "error") if action.startswith("ride") else ("user", "?")]
    assert conversation.database == []
    assert conversation.metrics == (0, 0, 0)
    # The agent may do better at once; the order of arguments does not matter.
    assert conversation.step("ride seat=back;day=tue;city=oslo").done
    assert conversation.metrics == (1, 1, 0)


@pytest.mark.parametrize(
    ("turns", "metrics"),
    [
        # City and seat are missing. Asked for and recorded: one of two; by a note, and by the final action.
        (["ask city", "city=oslo;ask seat"], (0, 0.5, 0)),
        (["ask city", "ride city=oslo;day=mon;seat=left"], (1, 0.5, 0)),
        # Right by luck, but not asked for: 0.
        (["ride city=oslo;day=mon;seat=back"], (1, 0, 0)),
        # Asked for and recorded wrongly; the last record counts.
        (["ask city", "city=rome;ask seat"], (0, 0, 0)),
        (["ask city", "city=rome;ask seat", "city=oslo;seat=left;ask day"], (0, 0.5, 0)),
        (["ask city", "city=oslo;ask seat", "city=rome;seat=back;ask day"], (0, 0.5, 0)),
        # What is not a slot of the schema is not recorded, an `ask` that is not understood does not ask.
        (["ask city=oslo", "city=oslo;sky=blue;ask sky"], (0, 0, 0)),
        (["ask city", "ask seat", "tell fare=42", "ride city=oslo;day=tue;seat=back"], (1, 1, 1)),
    ],
)
def test_metrics_equal_hand_counts(turns, metrics):
    assert replay(RIDE, turns) == pytest.approx(metrics)


@given(goals, st.integers(0, 2**32))
@settings(max_examples=300)
def test_gcr_never_exceeds_tcr_and_all_figures_are_shares_for_any_mix_of_right_and_random_turns(goal, seed):
    rng = random.Random(seed)
    tcr, acr, gcr = played(goal, wavering(rng, rng.random()))[1].metrics
    assert gcr <= tcr
    assert {tcr, gcr} <= {0, 1}
    assert 0 <= acr <= 1


def test_all_three_figures_tell_agents_apart():
    rng = random.Random(0)
    found = {played(goal, wavering(rng, 0.2))[1].metrics for goal in GOALS * 3}
    assert {(1, 1, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0), (1, 0, 0), (1, 0.5, 0)} <= found


# Agents


@given(goals)
@settings(max_examples=300)
def test_the_oracle_scores_one_on_all_with_a_turn_to_spare_and_in_the_room_there_is(goal):
    messages, conversation = played(goal, expert)
    assert conversation.metrics == (1, 1, 1)
    assert len(turns_of(messages)) < MOST_TURNS
    assert max(len(message["content"]) for message in messages[1:]) <= 44
    room = TASK_DEFAULTS["dialogue"]["sampling"]
    prompt = len(ENCODER.prompt(messages[:2]))
    assert prompt <= room["max_prompt_length"]
    assert len(ENCODER.prompt(messages)) - prompt <= room["max_completion_length"] - 40
    assert all(message["content"].isascii() for message in messages)


@given(goals)
def test_the_silent_agent_scores_zero_on_all_and_is_let_go_after_the_last_turn(goal):
    messages, conversation = played(goal, silent)
    assert conversation.metrics == (0, 0, 0)
    assert turns_of(messages) == [""] * MOST_TURNS
    assert rewards(goal, [""] * MOST_TURNS) == [None] * (MOST_TURNS - 1) + [0]


def test_ten_thousand_random_agents_never_crash_it_and_hardly_ever_succeed():
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    for i in range(10_000):
        messages, conversation = played(GOALS[i % len(GOALS)], random_agent(rng))
        assert 1 <= len(turns_of(messages)) <= MOST_TURNS
        counts["tcr"] += conversation.metrics.tcr
        counts["gcr"] += conversation.metrics.gcr
        counts.update(message["content"] for message in messages[3:] if message["role"] == "tool")
    assert counts["gcr"] < 10
    assert 2000 < counts["tcr"] < 9000  # it does get there, and it does get refused
    assert counts["error"] > 1000


@given(st.text(max_size=60))
def test_no_text_crashes_a_conversation(text):
    for turns in ([text] * MOST_TURNS, ["ask city", f"{text};ask day", f"ride {text}"]):
        assert replay(RIDE, turns).gcr == 0


@given(goals, st.integers(0, 2**32))
def test_the_same_turns_meet_the_same_replies(goal, seed):
    messages, conversation = played(goal, random_agent(random.Random(seed)))
    turns = iter(turns_of(messages))
    again, _ = played(goal, lambda so_far: next(turns))
    assert again == messages
    assert replay(goal, turns_of(messages)) == conversation.metrics


@given(goals, st.integers(0, 2**32))
def test_an_environment_that_is_reset_remembers_nothing(goal, seed):
    _, used = played(goal, wavering(random.Random(seed), 0.3))
    turns = turns_of(played(goal, expert)[0])
    used.reset()
    fresh = Conversation(goal)
    assert [used.step(turn) for turn in turns] == [fresh.step(turn) for turn in turns]
    assert used.metrics == (1, 1, 1)


# Demonstrations


def test_a_demonstration_is_a_whole_conversation_that_earns_all_unless_a_slip_is_in_it():
    rng = random.Random(0)
    for _ in range(200):
        goal, messages, slips = draw_demonstration(rng)
        assert goal.domain in SEEN
        assert not goal.held_out
        assert said(messages[:2]) == said(Conversation(goal).reset())
        assert messages[-1]["role"] == "assistant"
        assert bool(slips) == (replay(goal, turns_of(messages)) != (1, 1, 1))


def test_the_demonstrator_slips_by_slot_at_its_own_rate_and_never_where_it_is_sound():
    slipped, met = Counter(), Counter()
    rng = random.Random(0)
    for _ in range(6000):
        goal, _, slips = draw_demonstration(rng)
        met.update([Slip("change", goal.change[0]), *(Slip("ask", slot) for slot in goal.missing)])
        slipped.update(slips)
    assert len(met) == 30
    for slip, count in met.items():
        # 6000 draws meet each kind of slip some 400 times: a standard error of .025.
        assert slipped[slip] / count == pytest.approx(slip_probability(slip), abs=0.1)
    rates = [slip_probability(slip) for slip in met]
    assert 10 <= sum(rate == 0 for rate in rates) <= 20
    assert sum(rate > 0.5 for rate in rates) >= 8  # there a model that imitates errs greedily, too
    assert max(rates) < 0.9  # and yet writes the right turn often enough to be rewarded for it


def test_a_slip_shows_where_it_is_made_and_nowhere_else():
    slips = {Slip("ask", "city")}
    messages, conversation = played(RIDE, lambda so_far: expert(so_far, slips))
    assert turns_of(messages) == [
        "day=mon;ask seat",  # not a word about the city
        "seat=back;look day=mon",
        "tell fare=17",
        "ride city=rome;day=tue;seat=back",
    ]
    assert conversation.metrics == (1, 0.5, 0)
    assert demonstrate(RIDE, random.Random(0)).goal is RIDE


# Rewards


def test_the_reward_of_an_episode_is_paid_at_its_end():
    turns = ["ask city", "city=oslo;ask seat", "ride city=oslo;day=mon;seat=left"]
    # TCR 1, ACR 1/2, GCR 0: the mean is .5.
    assert rewards(RIDE, turns) == [None, None, pytest.approx(0.5)]


def test_the_task_is_made_by_its_name_and_knows_the_truth():
    task: Task = make_task(SimpleNamespace(name="dialogue", ood="unseen"))
    example = task.split("ood")[0]
    assert len(task.split("train")) == 4096
    assert example.columns["domain"] in UNSEEN
    assert task.environment(example).reset() == example.prompt
    assert task.true_reward([example.prompt], [""], [[]], domain=["social"], wanted=[{}]) == [0.0]
