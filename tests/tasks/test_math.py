import random
import re
from collections import Counter

import pytest

from dvpo.errors import InputError
from dvpo.tasks import Task
from dvpo.tasks.math import ChainArithmetic, Question, demonstrate, flaw, parse_answer

TASK = ChainArithmetic(train=400, id=100, ood=100)
SPLITS = ("train", "id", "ood")


def question_of(example):
    start, *operands = re.findall(r"[+-]?\d+", example.prompt[0]["content"])
    return Question(int(start), tuple(map(int, operands)))


def demonstrations(count, operations=3):
    rng = random.Random(0)
    return [demonstrate(Question.draw(operations, rng), rng) for _ in range(count)]


def test_a_question_is_written_answered_and_identified_the_same_everywhere():
    question = Question(23, (8, -5))
    assert question.text == "23+8-5="
    assert question.answer == 26
    # printf '23+8-5=' | sha256sum | cut -c1-16
    assert question.id == "0648d58bbbc57dc2"


def test_splits_have_the_sizes_asked_for_and_share_no_question():
    ids = {name: [example.id for example in TASK.split(name)] for name in SPLITS}
    assert [len(set(ids[name])) for name in SPLITS] == [400, 100, 100]
    assert not set(ids["train"]) & set(ids["id"])
    assert TASK.split("no such split") == ()


def test_held_out_questions_are_never_training_questions_whatever_the_seed():
    others = [ChainArithmetic(train=400, id=100, ood=100, seed=seed) for seed in (1, 2)]
    for task in (TASK, *others):
        assert not any(question_of(example).held_out for example in task.split("train"))
        assert all(question_of(example).held_out for name in ("id", "ood") for example in task.split(name))
    assert [e.id for e in others[0].split("train")] != [e.id for e in others[1].split("train")]


@pytest.mark.parametrize(("name", "operations"), [("train", {2, 3}), ("id", {2, 3}), ("ood", {4, 5, 6})])
def test_questions_are_in_range_and_ood_chains_are_longer(name, operations):
    seen = set()
    for example in TASK.split(name):
        question = question_of(example)
        partial_sums = [question.start + sum(question.operands[:i]) for i in range(len(question.operands) + 1)]
        assert 10 <= question.start <= 89
        assert all(1 <= abs(operand) <= 9 for operand in question.operands)
        assert all(0 <= value <= 99 for value in partial_sums)
        assert example.columns["answer"] == partial_sums[-1]
        assert example.id == question.id
        seen.add(example.columns["operations"])
    assert seen == operations


def test_a_split_that_cannot_be_filled_is_refused_at_once():
    with pytest.raises(InputError, match="split of 1000000"):
        ChainArithmetic(train=1_000_000)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("23+8=31;31-5=26;#26", 26),
        ("#26", 26),
        ("#0", 0),
        ("23+8=31;31-5=26;", None),
        ("", None),
        ("26", None),
        ("#26#26", None),
        ("#25;#26", None),
        ("#26;", None),
        ("#26 ", None),
        ("#26\n", None),
        ("# 26", None),
        ("#026", None),
        ("#+26", None),
        ("#-26", None),
        ("#2\uff16", None),
        ("#", None),
        ("#" + "9" * 10_000, None),
    ],
)
def test_only_one_final_number_counts_as_an_answer(completion, answer):
    assert parse_answer(completion) == answer


def test_true_reward_is_one_for_the_exact_answer_and_zero_for_all_else():
    completions = ["1+1=2;#2", "#3", "2", "1+1=2;2+1=3;#3"]
    rewards = TASK.true_reward(["1+1="] * 4, completions, [[1]] * 4, answer=[2, 2, 2, 2], operations=[1] * 4)
    assert rewards == [1.0, 0.0, 0.0, 0.0]


def test_the_task_is_a_task_and_its_episodes_take_one_step():
    task: Task = TASK
    example = task.split("id")[0]
    episode = task.environment(example)
    assert episode.reset() == example.prompt
    assert episode.step("#1").done


def test_a_demonstration_carries_on_from_its_own_wrong_results_and_names_every_slip():
    wrong = 0
    for question, solution, slips in demonstrations(500):
        *steps, final = solution.split(";")
        value, found = question.start, []
        for step, operand in zip(steps, question.operands, strict=True):
            left, result = step.split("=")
            assert left == f"{value}{operand:+d}"
            if int(result) != value + operand:
                found.append((f"{value % 10}{operand:+d}", int(result) - value - operand))
            value = int(result)
        assert final == f"#{value}"
        assert tuple(found) == slips
        assert len(solution) < 28
        wrong += value != question.answer
    assert 150 < wrong < 300


def test_an_answer_is_right_where_the_slips_add_up_to_nothing_and_two_may_cancel():
    cancelled = 0
    for question, solution, slips in demonstrations(3000):
        right = parse_answer(solution) == question.answer
        assert right == (sum(error for _, error in slips) == 0)
        cancelled += right and bool(slips)
    assert cancelled


def test_a_flawed_fact_errs_by_its_own_error_at_its_own_rate_and_a_sound_one_never():
    slipped, met = Counter(), Counter()
    for question, _, slips in demonstrations(30_000, operations=1):
        fact = f"{question.start % 10}{question.operands[0]:+d}"
        met[fact] += 1
        for name, error in slips:
            assert name == fact
            assert error == flaw(question.start % 10, question.operands[0]).error
            slipped[fact] += 1
    assert len(met) == 180
    for fact, count in met.items():
        known = flaw(int(fact[0]), int(fact[1:]))
        if known is None:
            assert slipped[fact] == 0
        else:
            # Solutions that leave 0..99 are drawn again, which lowers the rate a little at the edges.
            assert slipped[fact] / count == pytest.approx(known.probability, abs=0.25)


def test_imitation_errs_greedily_too_and_knows_the_right_result_of_every_fact():
    flaws = [flaw(units, operand) for units in range(10) for operand in range(-9, 10) if operand]
    usually_wrong = [known for known in flaws if known and known.probability > 0.5]
    assert 0.15 < len(usually_wrong) / len(flaws) < 0.35
    assert all(known.probability < 0.9 for known in flaws if known)
