"""The five kinds of science problem: what is asked, what is right, and how it is worked out, step by step.

A problem is worked out from what somebody *recalls* of each fact. One form of working thus serves the perfect
solver, the flawed demonstrator, and the search for plausible wrong options.
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self

from dvpo.seeding import derive_uniform
from dvpo.tasks.science_facts import (
    BUILDING_BLOCKS,
    CONSTANTS,
    DECIMAL_UNITS,
    ELEMENTS,
    EXPONENTS,
    LAWS,
    NAMES,
    OTHER_UNITS,
    Element,
    Recall,
    rounded,
    scaled,
    shifted,
    split_number,
    working_mass,
    written,
)

UNTRAINED_PAIRS = 0.3
"""Share of the pairs to be ordered that `task.ood: untrained` keeps from training."""


class Work(NamedTuple):
    """The steps as written, and where they lead."""

    steps: str
    result: str


class Problem(ABC):
    """What is asked, without options."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def draw(cls, rng: random.Random, ood: bool) -> Self:
        """Draw a problem whose composition is one of the training distribution, or unseen there (`ood`)."""

    @property
    @abstractmethod
    def text(self) -> str: ...

    @property
    def untrained(self) -> bool:
        """Whether it belongs to `ood` where `task.ood` is `untrained`: the warm start has met its composition, and
        training meets each of its facts in another one."""
        return False

    @property
    @abstractmethod
    def answer(self) -> str:
        """The right answer: a number to six digits, or the very text."""

    @abstractmethod
    def work(self, recall: Recall) -> Work:
        """Work it out from what is recalled, carrying on from each mistake."""


@dataclass(frozen=True)
class Conversion(Problem):
    """From any unit to a decimal one, by way of the base unit."""

    kind = "unit"
    count: int
    base: str
    source: str
    target: str

    @classmethod
    def draw(cls, rng: random.Random, ood: bool) -> Self:
        while True:
            base, other = rng.choice([(base, unit) for base, units in OTHER_UNITS.items() for unit in units])
            decimal = [base, *DECIMAL_UNITS[base]]
            source, target = other if rng.random() < 0.75 else rng.choice(decimal), rng.choice(decimal)
            if source != target and cls.unseen(base, source, target) == ood:
                return cls(rng.randint(1, 9), base, source, target)

    @staticmethod
    def unseen(base: str, source: str, target: str) -> bool:
        """Every other pair of those that need both hops: a chessboard, so that no unit is left out."""
        if base in (source, target):
            return False
        units = [*DECIMAL_UNITS[base], *OTHER_UNITS[base]]
        return (units.index(source) + units.index(target)) % 2 == 1

    @property
    def text(self) -> str:
        return f"{self.count}{self.source} to {self.target}?"

    @property
    def untrained(self) -> bool:
        """Two hops, each of which some question of one hop needs, too."""
        return self.base not in (self.source, self.target)

    @property
    def answer(self) -> str:
        sizes = {self.base: 1.0, **DECIMAL_UNITS[self.base], **OTHER_UNITS[self.base]}
        return f"{self.count * sizes[self.source] / sizes[self.target]:.6g}"

    def work(self, recall: Recall) -> Work:
        amount, steps = float(self.count), f"{self.count}{self.source}"
        if self.source in OTHER_UNITS[self.base]:
            truth = rounded(self.count * OTHER_UNITS[self.base][self.source])
            amount = recall(steps, truth, scaled(truth))
        elif self.source != self.base:
            amount *= self.decimal(self.source, recall)
        if self.source != self.base:
            steps += f"={written(amount)}{self.base}"
        if self.target != self.base:
            amount /= self.decimal(self.target, recall)
            steps += f"={written(amount)}{self.target}"
        return Work(steps + ";", written(amount))

    def decimal(self, unit: str, recall: Recall) -> float:
        size = DECIMAL_UNITS[self.base][unit]
        return recall(unit, size, [rounded(size * factor) for factor in (1e-3, 0.01, 0.1, 10, 100, 1e3)])


@dataclass(frozen=True)
class MolarMass(Problem):
    """Atoms of each element, summed in the formula's order."""

    kind = "molar_mass"
    parts: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, rng: random.Random, ood: bool) -> Self:
        while True:
            symbols = rng.sample(BUILDING_BLOCKS, rng.choice((3, 4) if ood else (1, 2, 2)))
            problem = cls(tuple((symbol, rng.randint(1, 4)) for symbol in symbols))
            if float(problem.answer) < 400:
                return problem

    @property
    def text(self) -> str:
        return f"M({''.join(map(self.group, self.parts))})?"

    @staticmethod
    def group(part: tuple[str, int]) -> str:
        symbol, count = part
        return f"{symbol}{count if count > 1 else ''}"

    @property
    def untrained(self) -> bool:
        """Two elements, each of which has a mass by itself."""
        return len(self.parts) == 2

    @property
    def answer(self) -> str:
        return f"{sum(count * ELEMENTS[symbol].mass for symbol, count in self.parts):.6g}"

    def work(self, recall: Recall) -> Work:
        total, steps = 0.0, ""
        for symbol, count in self.parts:
            truth = count * working_mass(symbol)
            mass = recall(self.group((symbol, count)), truth, self.mistaken(truth))
            steps += f"{self.group((symbol, count))}={mass:g}" + (f",{total + mass:g};" if total else ";")
            total += mass
        return Work(steps, f"{total:g}")

    @staticmethod
    def mistaken(truth: float) -> list[float]:
        halves = (round(2 * truth * factor) / 2 for factor in (0.25, 0.5, 0.75, 1.25, 1.5, 2))
        return [mass for mass in halves if mass not in (0, truth)]


@dataclass(frozen=True)
class Lookup(Problem):
    """Symbol to number, number to name; from symbol to name only by way of the number."""

    kind = "element"
    element: Element
    given: str
    wanted: str

    @classmethod
    def draw(cls, rng: random.Random, ood: bool) -> Self:
        directions = [("symbol", "name")] if ood else [("symbol", "number"), ("number", "name")]
        return cls(rng.choice(list(ELEMENTS.values())), *rng.choice(directions))

    @property
    def text(self) -> str:
        return f"{self.wanted} of {getattr(self.element, self.given)}?"

    @property
    def answer(self) -> str:
        return str(getattr(self.element, self.wanted))

    def work(self, recall: Recall) -> Work:
        symbol, number, steps = self.element.symbol, self.element.number, ""
        if self.given == "symbol":
            number = int(recall(f"number of {symbol}", number, shifted(number)))
            steps += f"{symbol}={number};"
        if self.wanted == "number":
            return Work(steps, str(number))
        name = NAMES[int(recall(f"name of {number}", number, shifted(number)))]
        return Work(f"{steps}{number}={name};", name)


@dataclass(frozen=True)
class Equation(Problem):
    """E = Nhf for N photons, PV = nRT, L = h/p for the wavelength L.

    The givens are such that they come down to one digit (and a power of ten) before the constant enters.
    """

    kind = "law"
    law: str
    target: str
    givens: tuple[tuple[str, float], ...]

    @classmethod
    def draw(cls, rng: random.Random, ood: bool) -> Self:
        name = rng.choice(list(LAWS))
        law = LAWS[name]
        variables = law.left + law.right
        target = law.unseen if ood else rng.choice([variable for variable in variables if variable != law.unseen])
        while True:
            values = [
                (variable, float(f"{rng.randint(1, 9)}e{rng.randint(*EXPONENTS[variable])}"))
                for variable in variables
                if variable != target
            ]
            equation = cls(name, target, tuple(values))
            if not equation.over or len(split_number(equation.quotient)[0]) == 1:
                return equation

    @property
    def text(self) -> str:
        return f"{self.law} {' '.join(f'{name}={written(value)}' for name, value in self.givens)} {self.target}?"

    @property
    def untrained(self) -> bool:
        """The volume of a gas takes the products with R that its pressure takes."""
        return (self.law, self.target) == ("gas", "V")

    @property
    def times_constant(self) -> bool:
        """Whether the target equals the givens' quotient times the constant; otherwise it is divided by it."""
        return self.target in LAWS[self.law].left

    @property
    def over(self) -> tuple[str, ...]:
        """The givens in the numerator: the variables on the other side than the target."""
        return LAWS[self.law].right if self.times_constant else LAWS[self.law].left

    @property
    def under(self) -> tuple[str, ...]:
        """The givens in the denominator: the variables on the target's side."""
        return tuple(name for name, _ in self.givens if name not in self.over)

    @property
    def quotient(self) -> float:
        values = dict(self.givens)
        return math.prod(values[name] for name in self.over) / math.prod(values[name] for name in self.under)

    @property
    def answer(self) -> str:
        constant = CONSTANTS[LAWS[self.law].constant]
        return f"{self.quotient * constant if self.times_constant else self.quotient / constant:.6g}"

    def work(self, recall: Recall) -> Work:
        steps, given = self.simplify()
        symbol, (digit, exponent) = LAWS[self.law].constant, split_number(given)
        constant, count = CONSTANTS[symbol], int(digit)
        if not self.over:
            formula, fact, truth = f"{symbol}/{self.under[0]}", f"{symbol}/{digit}", constant / count
            exponent = -exponent
        elif self.times_constant:
            formula, fact, truth = f"*{symbol}", f"{digit}*{symbol}", count * constant
        else:
            formula, fact, truth = f"/{symbol}", f"{digit}/{symbol}", count / constant
        result = written(recall(fact, rounded(truth), scaled(truth)) * 10.0**exponent)
        return Work(f"{steps}{formula}={result};", result)

    def simplify(self) -> tuple[str, float]:
        """Bring the givens down to one number, written step by step: `PV=1.2e4;/T=4e1;`."""
        values, formula, steps = dict(self.givens), "".join(self.over), ""
        if not self.over:
            return steps, values[self.under[0]]
        value = math.prod(values[name] for name in self.over)
        if len(self.over) > 1:
            steps, formula = f"{formula}={written(value)};", ""
        for name in self.under:
            value /= values[name]
            steps, formula = f"{steps}{formula}/{name}={written(value)};", ""
        return steps, value


@dataclass(frozen=True)
class Order(Problem):
    """Elements sorted by mass or density, the least first; near enough for a mistake to matter, never too near."""

    kind = "order"
    symbols: tuple[str, ...]
    quantity: str

    @classmethod
    def draw(cls, rng: random.Random, ood: bool) -> Self:
        quantity = rng.choice(("mass", "density"))
        known = [element.symbol for element in ELEMENTS.values() if getattr(element, quantity)]
        while True:
            problem = cls(tuple(rng.sample(known, 3 if ood else 2)), quantity)
            values = sorted(map(problem.value, problem.symbols))
            if all(1.05 * low < high < 2.5 * low for low, high in pairwise(values)):
                return problem

    def value(self, symbol: str) -> float:
        """The mass to the nearest integer, the density to two digits."""
        value: float = getattr(ELEMENTS[symbol], self.quantity)
        return float(round(value)) if self.quantity == "mass" else float(f"{value:.2g}")

    @property
    def text(self) -> str:
        return f"{','.join(self.symbols)} by {self.quantity}?"

    @property
    def untrained(self) -> bool:
        """Some pairs, in either order."""
        return derive_uniform("untrained", self.quantity, *sorted(self.symbols)) < UNTRAINED_PAIRS

    @property
    def answer(self) -> str:
        return "<".join(sorted(self.symbols, key=self.value))

    def work(self, recall: Recall) -> Work:
        values = {}
        for symbol in self.symbols:
            truth = self.value(symbol)
            values[symbol] = recall(f"{self.quantity} of {symbol}", truth, scaled(truth))
        steps = "".join(f"{symbol}={value:g};" for symbol, value in values.items())
        return Work(steps, "<".join(sorted(self.symbols, key=lambda symbol: values[symbol])))


KINDS: tuple[type[Problem], ...] = (Conversion, MolarMass, Lookup, Equation, Order)
