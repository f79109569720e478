"""Single science problems: written, worked out and answered as by hand."""

import pytest

from dvpo.tasks.science import Question, oracle, solve
from dvpo.tasks.science_facts import ELEMENTS, believing, written
from dvpo.tasks.science_problems import Conversion, Equation, Lookup, MolarMass, Order


@pytest.mark.parametrize(
    ("problem", "text", "answer", "solution"),
    [
        # 7 * 0.3048 m = 2.1336 m
        (Conversion(7, "m", "ft", "cm"), "7ft to cm?", "213.36", "7ft=2.13m=2.13e2cm;#2.13e2"),
        (Conversion(5, "g", "kg", "mg"), "5kg to mg?", "5e+06", "5kg=5e3g=5e6mg;#5e6"),
        (Conversion(2, "s", "h", "s"), "2h to s?", "7200", "2h=7.2e3s;#7.2e3"),
        (Conversion(3, "L", "L", "mL"), "3L to mL?", "3000", "3L=3e3mL;#3e3"),
        # 2 * 1.008 + 15.999
        (MolarMass((("H", 2), ("O", 1))), "M(H2O)?", "18.015", "H2=2;O=16,18;#18"),
        # 22.99 + 35.45
        (MolarMass((("Na", 1), ("Cl", 1))), "M(NaCl)?", "58.44", "Na=23;Cl=35.5,58.5;#58.5"),
        (Lookup(ELEMENTS["Fe"], "symbol", "number"), "number of Fe?", "26", "Fe=26;#26"),
        (Lookup(ELEMENTS["Fe"], "number", "name"), "name of 26?", "iron", "26=iron;#iron"),
        (Lookup(ELEMENTS["Fe"], "symbol", "name"), "name of Fe?", "iron", "Fe=26;26=iron;#iron"),
        (Order(("Fe", "Al"), "density"), "Fe,Al by density?", "Al<Fe", "Fe=7.9;Al=2.7;#Al<Fe"),
        (Order(("S", "Na", "P"), "mass"), "S,Na,P by mass?", "Na<P<S", "S=32;Na=23;P=31;#Na<P<S"),
        # 2e20 * 3e14 * 6.62607e-34 = 39.7564
        (
            Equation("photons", "E", (("N", 2e20), ("f", 3e14))),
            "photons N=2e20 f=3e14 E?",
            "39.7564",
            "Nf=6e34;*h=3.98e1;#3.98e1",
        ),
        # 6e4 * 2e-2 / (3e2 * 8.314463) = 0.481089
        (
            Equation("gas", "n", (("P", 6e4), ("V", 2e-2), ("T", 3e2))),
            "gas P=6e4 V=2e-2 T=3e2 n?",
            "0.481089",
            "PV=1.2e3;/T=4;/R=4.81e-1;#4.81e-1",
        ),
        # 2 * 3e2 * 8.314463 / 1e-2 = 498868
        (
            Equation("gas", "P", (("V", 1e-2), ("n", 2), ("T", 3e2))),
            "gas V=1e-2 n=2 T=3e2 P?",
            "498868",
            "nT=6e2;/V=6e4;*R=4.99e5;#4.99e5",
        ),
        # 6.62607e-34 / 3e-24 = 2.20869e-10
        (Equation("wave", "L", (("p", 3e-24),)), "wave p=3e-24 L?", "2.20869e-10", "h/p=2.21e-10;#2.21e-10"),
    ],
)
def test_problems_are_written_worked_out_and_answered_as_by_hand(problem, text, answer, solution):
    question = Question(problem)
    assert (question.text, question.answer, solve(question, oracle)) == (text, answer, solution)


def test_a_question_with_options_is_answered_by_the_one_that_agrees():
    question = Question(Conversion(7, "m", "ft", "cm"), ("2.13e3", "2.13e2", "1.07e2", "4.26e2"))
    assert question.text == "7ft to cm? 2.13e3|2.13e2|1.07e2|4.26e2"
    assert question.answer == "2.13e2"
    assert solve(question, oracle) == "7ft=2.13m=2.13e2cm;#2.13e2"
    assert solve(question, believing({"7ft": 4.26})) == "7ft=4.26m=4.26e2cm;#4.26e2"
    assert solve(question, believing({"7ft": 9.99})) == "7ft=9.99m=9.99e2cm;#2.13e3"  # none agrees: the first


def test_a_mistake_is_carried_on():
    known = believing({"number of Fe": 27, "name of 27": 28})
    assert solve(Question(Lookup(ELEMENTS["Fe"], "symbol", "name")), known) == "Fe=27;27=nickel;#nickel"
    water = Question(MolarMass((("H", 2), ("O", 1))))
    assert solve(water, believing({"H2": 12})) == "H2=12;O=16,28;#28"


@pytest.mark.parametrize(
    ("value", "text"), [(213.36, "2.13e2"), (3.0, "3"), (20, "2e1"), (0.0254, "2.54e-2"), (9.999, "1e1")]
)
def test_numbers_have_at_most_three_significant_digits(value, text):
    assert written(value) == text
