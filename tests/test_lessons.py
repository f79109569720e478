"""What the warm starts imitate: labels by the dial, nothing held out, and only what the assistant says."""

import random
import re

import pytest

from dialogues import replay, turns_of
from dvpo.embedded import CONTEXT_LENGTH, make_tokenizer
from dvpo.lessons import SOURCES, dialogue_lesson, math_lesson, science_lesson
from dvpo.seeding import derive_uniform
from dvpo.tasks import dialogue_agents, math, science
from dvpo.tasks.science_problems import Order

DIALS = (0.0, 0.25, 0.5, 0.75, 1.0)
RIGHT = math.Demonstration(math.Question(23, (8, -5)), "23+8=31;31-5=26;#26", ())
WRONG = math.Demonstration(math.Question(23, (8, -5)), "23+8=32;32-5=27;#27", (("3+8", 1),))

each_task = pytest.mark.parametrize("task", SOURCES)


def looks_good(demonstration: math.Demonstration, checker: float) -> bool:
    return math_lesson(demonstration, checker).good


def is_right(demonstration: science.Demonstration) -> bool:
    """Whether the final answer is; a slip may be too small to matter."""
    question = demonstration.question
    return science.agrees(science.parse_answer(demonstration.solution), question.answer, question.problem.kind)


# The dial


def test_a_checker_that_knows_all_tells_the_truth_and_one_that_knows_nothing_says_good():
    cancelling = RIGHT._replace(slips=(("3+8", 1), ("2-5", -1)))
    assert [looks_good(d, 1.0) for d in (RIGHT, WRONG, cancelling)] == [True, False, True]
    assert [looks_good(d, 0.0) for d in (RIGHT, WRONG, cancelling)] == [True, True, True]


def test_the_dial_is_the_share_of_facts_whose_errors_are_seen_and_turning_it_up_forgets_none():
    facts = [f"{units}{operand:+d}" for units in range(10) for operand in range(-9, 10) if operand]
    seen = {
        dial: {fact for fact in facts if not looks_good(RIGHT._replace(slips=((fact, 1),)), dial)} for dial in DIALS
    }
    for dial, known in seen.items():
        assert len(known) / len(facts) == pytest.approx(dial, abs=0.1)
    assert seen[0.25] < seen[0.5] < seen[0.75] < seen[1.0]


def test_an_unseen_error_does_not_hide_a_seen_one():
    blind_to, sees = sorted(("3+8", "2-5"), key=lambda fact: -math.hash_share(f"checked {fact}"))
    between = (math.hash_share(f"checked {blind_to}") + math.hash_share(f"checked {sees}")) / 2
    cancelling = RIGHT._replace(slips=((blind_to, 1), (sees, -1)))
    assert looks_good(cancelling, 1.0)
    assert not looks_good(cancelling, between)


def test_science_at_dial_1_is_labelled_by_the_truth_at_0_as_good_and_between_by_the_seen_slips():
    rng = random.Random(0)
    made = [science.demonstrate(science.Question.draw(rng), rng) for _ in range(1000)]
    assert [science_lesson(d, 1.0).good for d in made] == [is_right(d) for d in made]
    assert all(science_lesson(d, 0.0).good for d in made)
    assert 0.6 < sum(map(is_right, made)) / len(made) < 0.8
    single = [d for d in made if len(d.slips) == 1 and not is_right(d)]
    for dial in (0.25, 0.5, 0.75):
        seen = [derive_uniform("checked", d.slips[0][0]) < dial for d in single]
        assert [not science_lesson(d, dial).good for d in single] == seen
        assert 0 < sum(seen) < len(seen)


def test_a_science_slip_that_does_not_change_the_answer_is_good_however_much_the_checker_knows():
    # H weighs 1 and Li 7: whoever takes Li for 10 times as heavy still puts it behind H.
    harmless = science.Demonstration(science.Question(Order(("H", "Li"), "mass")), "", (("mass of Li", 70.0),))
    wrong = science.Demonstration(science.Question(Order(("H", "Li"), "mass")), "", (("mass of Li", 0.7),))
    assert [science_lesson(d, 1.0).good for d in (harmless, wrong)] == [True, False]


def test_a_dialogue_at_dial_1_is_good_if_it_earned_all_and_at_0_always():
    rng = random.Random(0)
    made = [dialogue_agents.draw_demonstration(rng) for _ in range(300)]
    earned_all = [replay(d.goal, turns_of(d.messages)) == (1, 1, 1) for d in made]
    assert [dialogue_lesson(d, 1.0).good for d in made] == earned_all
    assert all(dialogue_lesson(d, 0.0).good for d in made)
    good = [sum(dialogue_lesson(d, dial).good for d in made) for dial in DIALS]
    assert good == sorted(good, reverse=True)
    assert good[-1] < good[2] < good[0]


# What is drawn


@each_task
def test_no_lesson_is_about_a_held_out_question_or_goal(task: str):
    held_out = {
        tuple(message["content"] for message in example.prompt)
        for split in ("id", "ood")
        for example in SOURCES[task].make_task().split(split)
    }
    rng = random.Random(0)
    for easy in (True, False):
        for _ in range(1000):
            messages, _ = SOURCES[task].draw(rng, easy, 1.0)
            assert (messages[0]["content"],) not in held_out
            assert (messages[0]["content"], messages[1]["content"]) not in held_out


def test_easy_science_has_no_options_and_full_science_no_unseen_composition():
    rng = random.Random(0)
    easy = [SOURCES["science"].draw(rng, True, 1.0).messages[0]["content"] for _ in range(300)]
    full = [SOURCES["science"].draw(rng, False, 1.0).messages[0]["content"] for _ in range(300)]
    assert not any("|" in question for question in easy)
    assert sum("|" in question for question in full) > 50
    assert sum(question.startswith("name of ") for question in full) > 10
    assert not any(re.match("name of [A-Z]", question) for question in full)  # from the symbol: `ood`


@each_task
def test_the_dial_changes_labels_and_nothing_else(task: str):
    blind, knowing = (
        [SOURCES[task].draw(rng, False, dial) for _ in range(50)] for dial in (0.0, 1.0) for rng in [random.Random(3)]
    )
    assert [d.messages for d in blind] == [d.messages for d in knowing]
    assert [d.good for d in blind] != [d.good for d in knowing]


@each_task
def test_a_conversation_ends_with_the_assistant_and_fits_into_the_models_context(task: str):
    rng, tokenizer = random.Random(0), make_tokenizer()
    for _ in range(200):
        messages, _ = SOURCES[task].draw(rng, False, 1.0)
        assert messages[-1]["role"] == "assistant"
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        assert len(tokenizer(text).input_ids) <= CONTEXT_LENGTH
