import random
import string
from collections import Counter, defaultdict
from itertools import pairwise

import periodictable
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import constants

from dvpo.errors import InputError
from dvpo.tasks import Task
from dvpo.tasks.named import make_task
from dvpo.tasks.science import (
    EXACT_KINDS,
    Question,
    Science,
    agrees,
    demonstrate,
    flaw_probability,
    misbelief,
    oracle,
    parse_answer,
    size,
    solve,
)
from dvpo.tasks.science_facts import (
    BUILDING_BLOCKS,
    CONSTANTS,
    DECIMAL_UNITS,
    ELEMENTS,
    OTHER_UNITS,
    believing,
    working_mass,
)
from dvpo.tasks.science_problems import KINDS, Conversion, Equation, Lookup, MolarMass, Order

TASK = Science()
SPLITS = ("train", "id", "ood")
TOLERANT = ("unit", "molar_mass", "law")


def questions(count, ood, seed=0):
    rng = random.Random(seed)
    return [Question.draw(rng, ood) for _ in range(count)]


FAMILIAR, UNSEEN = questions(4000, ood=False), questions(4000, ood=True)
ALL = FAMILIAR + UNSEEN


def facts_of(question):
    """Each fact that the question rests on, with its true value and what it may be mistaken for."""
    facts = {}

    def note(fact, truth, others):
        facts[fact] = (truth, others)
        return truth

    question.problem.work(note)
    return facts


def prompt_of(example):
    return example.prompt[0]["content"]


def reward(completion, answer, kind):
    return TASK.true_reward(["?"], [completion], [[1]], answer=[answer], kind=[kind])[0]


# The figures.


def test_elements_agree_with_periodictable():
    assert len(ELEMENTS) == 40
    for element in ELEMENTS.values():
        reference = periodictable.elements.symbol(element.symbol)
        assert (element.number, element.name) == (reference.number, reference.name)
        assert element.mass == pytest.approx(reference.mass, rel=1e-4)
        if element.density is not None:
            assert element.density == pytest.approx(reference.density, rel=1e-3)


def test_constants_and_units_agree_with_scipy():
    c = constants
    assert {"h": c.h, "R": c.R} == CONSTANTS
    references = {
        "m": {"in": c.inch, "ft": c.foot, "mi": c.mile, "um": c.micro, "mm": c.milli, "cm": c.centi, "km": c.kilo},
        "g": {"oz": c.ounce / c.gram, "lb": c.pound / c.gram, "ug": c.micro, "mg": c.milli, "kg": c.kilo},
        "s": {"min": c.minute, "h": c.hour, "ns": c.nano, "us": c.micro, "ms": c.milli},
        "J": {"eV": c.eV, "cal": c.calorie, "mJ": c.milli, "kJ": c.kilo, "MJ": c.mega},
        "Pa": {"torr": c.torr, "atm": c.atm, "hPa": c.hecto, "kPa": c.kilo, "MPa": c.mega},
        "L": {"gal": c.gallon / c.liter, "uL": c.micro, "mL": c.milli, "cL": c.centi},
    }
    for base, units in references.items():
        assert {**OTHER_UNITS[base], **DECIMAL_UNITS[base]} == pytest.approx(units, rel=1e-8)
    assert list(references) == list(OTHER_UNITS) == list(DECIMAL_UNITS)


def test_molar_masses_agree_with_periodictable_and_are_worked_out_within_the_tolerance():
    for symbol in BUILDING_BLOCKS:
        assert working_mass(symbol) == pytest.approx(ELEMENTS[symbol].mass, rel=0.009)
    for question in ALL:
        if isinstance(question.problem, MolarMass):
            formula = question.problem.text[2:-2]
            assert float(question.problem.answer) == pytest.approx(periodictable.formula(formula).mass, rel=1e-4)


# Splits.


def test_a_question_is_identified_the_same_everywhere():
    # printf 'name of Fe?' | sha256sum | cut -c1-16
    assert Question(Lookup(ELEMENTS["Fe"], "symbol", "name")).id == "c1a83639ff4f0350"


def test_splits_have_the_sizes_asked_for_and_share_no_question():
    ids = {name: {example.id for example in TASK.split(name)} for name in SPLITS}
    assert [len(ids[name]) for name in SPLITS] == [4096, 256, 256]
    assert not ids["train"] & ids["id"]
    assert not (ids["train"] | ids["id"]) & ids["ood"]
    assert TASK.split("no such split") == ()


def test_held_out_questions_are_never_training_questions_whatever_the_seed():
    tasks = [Science(train=300, id=100, ood=50, seed=seed) for seed in range(3)]
    trained = {example.id for task in tasks for example in task.split("train")}
    assert not trained & {example.id for task in tasks for name in ("id", "ood") for example in task.split(name)}
    assert tasks[0].split("train") != tasks[1].split("train")
    assert tasks[0].split("train") == Science(train=300, id=0, ood=0).split("train")


def test_untrained_questions_are_familiar_ones_that_training_lacks_and_put_together_facts_that_it_has():
    task = Science(ood_kind="untrained")
    ids = {name: {example.id for example in task.split(name)} for name in SPLITS}
    assert not ids["train"] & ids["id"]
    assert not (ids["train"] | ids["id"]) & ids["ood"]
    trained, kept = ({q.problem for q in FAMILIAR if q.problem.untrained == untrained} for untrained in (False, True))
    assert {p.kind for p in trained} == {kind.kind for kind in KINDS}
    assert {p.kind for p in kept} == {kind.kind for kind in KINDS} - {"element"}  # nothing is shared by its two lookups
    texts = {name: {e.prompt[0]["content"].split("?")[0] + "?" for e in task.split(name)} for name in SPLITS}
    for problem in trained | kept:
        assert not any(problem.text in texts[name] for name in (SPLITS[:2] if problem.untrained else SPLITS[2:]))

    def facts(problems):
        found = []

        def note(fact, truth, others):
            del others
            found.append(fact)
            return truth

        for problem in problems:
            problem.work(note)
        return set(found)

    needed = facts(kept)
    assert len(needed - facts(trained)) < 0.06 * len(needed)  # some are too rare for 4,000 draws


def composition(problem):
    """What is put together."""
    match problem:
        case Conversion():
            return f"{problem.source} to {problem.target}"
        case MolarMass():
            return f"{len(problem.parts)} elements"
        case Lookup():
            return f"{problem.given} to {problem.wanted}"
        case Equation():
            return f"{problem.law} {problem.target}"
        case Order():
            return f"{len(problem.symbols)} by {problem.quantity}"


def test_no_composition_is_both_familiar_and_unseen():
    familiar, unseen = ({(q.problem.kind, composition(q.problem)) for q in part} for part in (FAMILIAR, UNSEEN))
    assert not familiar & unseen
    kinds = {kind.kind for kind in KINDS}
    assert {kind for kind, _ in familiar} == {kind for kind, _ in unseen} == kinds
    by_kind = defaultdict(set)
    for kind, name in unseen:
        by_kind[kind].add(name)
    assert by_kind["molar_mass"] == {"3 elements", "4 elements"}
    assert by_kind["element"] == {"symbol to name"}
    assert by_kind["law"] == {"photons f", "gas T", "wave p"}
    assert by_kind["order"] == {"3 by mass", "3 by density"}
    assert {("unit", f"{source} to km") for source in ("ft", "in", "mi")} & unseen


def test_the_splits_draw_the_compositions_that_they_should():
    for name, ood in (("id", False), ("ood", True)):
        drawn = {question.text for question in questions(3000, ood, seed=f"{name} 0")}
        assert {prompt_of(example) for example in TASK.split(name)} <= drawn


def test_unseen_compositions_rest_on_facts_that_training_meets():
    seen = {q.text: q for q in questions(9000, ood=False, seed="train 0")}
    met = {fact for example in TASK.split("train") for fact in facts_of(seen[prompt_of(example)])}
    assert {fact for question in UNSEEN for fact in facts_of(question)} <= met


def test_a_fact_has_one_truth_whatever_the_question():
    known = {}
    for question in ALL:
        for fact, value in facts_of(question).items():
            assert known.setdefault(fact, value) == value
            assert value[0] not in value[1]
    assert 350 < len(known) < 400


def test_prompts_and_solutions_are_short_ascii_and_the_longest_fits():
    for question in ALL:
        solution = solve(question, oracle)
        assert len(question.text) <= 66
        assert len(solution) < 56  # docs/tasks.md; the end token is one more
        assert (question.text + solution).isascii()


def test_a_split_that_cannot_be_filled_is_refused_at_once():
    with pytest.raises(InputError, match="split of 1000000"):
        Science(train=1_000_000)


def test_the_task_is_a_task_with_episodes_of_one_step_and_string_columns():
    task: Task = TASK
    for name in SPLITS:
        for example in task.split(name):
            assert set(example.columns) == {"answer", "kind"}
            assert all(isinstance(value, str) for value in example.columns.values())
    episode = task.environment(task.split("id")[0])
    assert episode.reset() == task.split("id")[0].prompt
    assert episode.step("#1").done


def test_a_config_can_name_the_task():
    from dvpo.settings import TaskConfig

    assert make_task(TaskConfig(name="science")).name == "science"


# Options.


def test_four_options_hold_the_right_answer_once_and_nothing_else_that_is_right():
    asked = [question for question in ALL if question.options]
    assert len(asked) > 2500
    for question in asked:
        problem, options = question.problem, question.options
        assert len(set(options)) == 4
        assert [agrees(option, problem.answer, problem.kind) for option in options].count(True) == 1
        assert question.answer in options
        assert agrees(question.answer, problem.answer, problem.kind)
        if problem.kind in TOLERANT:
            values = sorted(map(float, options))
            assert all(high / low > 1.024 for low, high in pairwise(values))


def test_the_right_option_stands_at_each_place_equally_often():
    places = Counter(question.options.index(question.answer) for question in ALL if question.options)
    count = places.total()
    # Four standard deviations of a binomial share of a quarter.
    assert all(abs(places[place] - count / 4) < 4 * (count * 3 / 16) ** 0.5 for place in range(4))


@pytest.mark.parametrize("kind", ["unit", "molar_mass", "element", "law"])
def test_the_right_option_is_not_given_away_by_its_place_among_the_values(kind):
    ranks = Counter()
    for question in questions(12_000, ood=False, seed=4):
        if question.options and question.problem.kind == kind:
            ranks[sum(size(option) < size(question.answer) for option in question.options)] += 1
    assert ranks.total() > 1000
    assert max(ranks.values()) / ranks.total() < 0.31


def test_likely_mistakes_are_among_the_options_whether_the_demonstrator_makes_them_or_not():
    offered = defaultdict(list)
    for question in ALL:
        for fact, (_, others) in facts_of(question).items() if question.options else ():
            result = question.problem.work(believing({fact: misbelief(fact, others)})).result
            found = any(agrees(result, option, question.problem.kind) for option in question.options)
            offered[flaw_probability(fact) > 0].append(found)
    flawed, sound = (sum(offered[case]) / len(offered[case]) for case in (True, False))
    assert min(flawed, sound) > 0.6
    assert flawed == pytest.approx(sound, abs=0.05)


# The verifier.


def test_the_oracles_solution_is_always_right():
    for question in ALL:
        assert reward(solve(question, oracle), question.answer, question.problem.kind) == 1.0


def test_a_mistake_in_any_fact_is_rejected_unless_it_stays_within_the_tolerance():
    rejected = 0
    for question in ALL:
        problem = question.problem
        for fact, (_, others) in facts_of(question).items():
            for other in others:
                completion = solve(question, believing({fact: other}))
                final = completion.split("#")[1]
                if question.options or problem.kind in EXACT_KINDS:
                    right = final == question.answer
                else:
                    right = abs(float(final) / float(question.answer) - 1) <= 0.01
                assert reward(completion, question.answer, problem.kind) == right
                rejected += not right
    assert rejected > 20_000


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7ft=2.13m;#2.13", "2.13"),
        ("#Al<Fe", "Al<Fe"),
        ("#B", "B"),
        ("", None),
        ("2.13", None),
        ("#", None),
        ("#1 2 3", None),
        ("#1,2,3", None),
        ("1 2 3", None),
        ("#1#2", None),
        ("#2;#2", None),
        ("##2", None),
        ("#2;", None),
        ("#2 ", None),
        ("#2\n", None),
        ("# 2", None),
        ("#A B", None),
        ("#A|B", None),
        ("#\uff12", None),
        ("#" + "9" * 10_000, None),
    ],
)
def test_only_one_final_answer_counts(completion, answer):
    assert parse_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "right", "kind", "verdict"),
    [
        ("2.13e2", "213.36", "unit", True),
        ("213", "213.36", "unit", True),
        ("213.36e0", "213.36", "unit", True),
        ("211", "213.36", "unit", False),  # 1.1% low
        ("216", "213.36", "unit", False),  # 1.2% high
        ("-213", "213.36", "unit", False),
        ("2.13e3", "213.36", "unit", False),
        ("0", "1e-30", "law", False),
        ("1e-20", "1e-30", "law", False),
        ("nan", "213.36", "unit", False),
        ("inf", "213.36", "unit", False),
        ("1e999", "213.36", "unit", False),
        ("0213", "213.36", "unit", False),
        ("A", "213.36", "unit", False),
        ("2.13e2", "B", "unit", False),
        ("b", "B", "unit", False),
        ("B", "B", "unit", True),
        ("AB", "B", "unit", False),
        ("82", "82", "element", True),
        ("82.1", "82", "element", False),
        ("82.0", "82", "element", False),
        ("Iron", "iron", "element", False),
        ("Fe<Al", "Al<Fe", "order", False),
        ("Al<Fe<Al", "Al<Fe", "order", False),
        ("Al", "Al<Fe", "order", False),
    ],
)
def test_numbers_agree_within_one_percent_and_all_else_to_the_letter(answer, right, kind, verdict):
    assert agrees(answer, right, kind) is verdict
    assert reward(f"#{answer}", right, kind) == float(verdict)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from(string.printable + "\u0663\u00b2\u2212\x00") | st.characters(), max_size=40),
    question=st.sampled_from(ALL),
)
def test_malformed_completions_never_crash_and_never_score(text, question):
    kind, answer = question.problem.kind, question.answer
    good = solve(question, oracle)
    malformed = [text, text + good[:-1], good + "#" + text, good + " " + text, f"#{answer},{text}", f"#{text}#{answer}"]
    for completion in malformed:
        final = completion.rpartition("#")[2]
        scored = reward(completion, answer, kind)
        assert scored in (0.0, 1.0)
        if scored and final != answer:
            assert kind in TOLERANT
            assert float(final) == pytest.approx(float(answer), rel=0.0101)
        assert not scored or completion.count("#") == 1


# The demonstrator.


def test_a_demonstration_names_every_slip_and_is_right_without_one():
    rng = random.Random(1)
    for question in ALL:
        demonstration = demonstrate(question, rng)
        assert demonstration.question is question
        assert demonstration.solution == solve(question, believing(dict(demonstration.slips)))
        assert demonstration.slips or reward(demonstration.solution, question.answer, question.problem.kind) == 1


def test_a_flawed_fact_errs_by_its_own_value_at_its_own_rate_and_a_sound_one_never():
    met, slipped, rng = Counter(), Counter(), random.Random(2)
    for question in FAMILIAR * 6:
        facts, slips = facts_of(question), dict(demonstrate(question, rng).slips)
        met.update(facts.keys())
        slipped.update(slips.keys())
        # What is looked up after a mistake is another fact, which the question itself does not rest on.
        assert all(slips[fact] == misbelief(fact, facts[fact][1]) for fact in slips.keys() & facts.keys())
    assert len(met) > 350
    for fact, count in met.items():
        rate, expected = slipped[fact] / count, flaw_probability(fact)
        assert rate == pytest.approx(expected, abs=5 * (expected * (1 - expected) / count) ** 0.5)


def test_imitation_errs_greedily_too_and_knows_the_right_value_of_every_fact():
    rates = [flaw_probability(fact) for fact in {fact for question in ALL for fact in facts_of(question)}]
    assert 0.25 < sum(rate > 0.5 for rate in rates) / len(rates) < 0.45
    assert max(rates) < 0.86
    by_kind = defaultdict(list)
    rng = random.Random(3)
    for question in FAMILIAR:
        kind = question.problem.kind
        by_kind[kind].append(reward(demonstrate(question, rng).solution, question.answer, kind))
    assert all(0.5 < sum(right) / len(right) < 0.9 for right in by_kind.values())
