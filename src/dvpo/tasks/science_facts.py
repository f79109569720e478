"""What the science task knows: elements, units, constants, laws; how numbers are written; how a fact is recalled.

A test compares the figures with `periodictable` and `scipy.constants`; the package itself needs neither.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Element(NamedTuple):
    """Mass in g/mol; density in g/cm3, None for gases and where forms differ (graphite and diamond)."""

    symbol: str
    number: int
    name: str
    mass: float
    density: float | None


TABLE = """
    H 1 hydrogen 1.008 -            | He 2 helium 4.0026 -
    Li 3 lithium 6.94 0.534         | Be 4 beryllium 9.0122 1.848
    B 5 boron 10.81 2.34            | C 6 carbon 12.011 -
    N 7 nitrogen 14.007 -           | O 8 oxygen 15.999 -
    F 9 fluorine 18.998 -           | Ne 10 neon 20.18 -
    Na 11 sodium 22.99 0.971        | Mg 12 magnesium 24.305 1.738
    Al 13 aluminum 26.982 2.699     | Si 14 silicon 28.085 2.33
    P 15 phosphorus 30.974 -        | S 16 sulfur 32.06 -
    Cl 17 chlorine 35.45 -          | Ar 18 argon 39.95 -
    K 19 potassium 39.098 0.862     | Ca 20 calcium 40.078 1.55
    Ti 22 titanium 47.867 4.54      | Cr 24 chromium 51.996 7.19
    Mn 25 manganese 54.938 7.33     | Fe 26 iron 55.845 7.874
    Co 27 cobalt 58.933 8.9         | Ni 28 nickel 58.693 8.902
    Cu 29 copper 63.546 8.96        | Zn 30 zinc 65.38 7.133
    Br 35 bromine 79.904 3.12       | Kr 36 krypton 83.798 -
    Ag 47 silver 107.87 10.5        | Sn 50 tin 118.71 7.31
    I 53 iodine 126.9 4.93          | Xe 54 xenon 131.29 -
    Ba 56 barium 137.33 3.5         | W 74 tungsten 183.84 19.3
    Pt 78 platinum 195.08 21.45     | Au 79 gold 196.97 19.3
    Hg 80 mercury 200.59 13.55      | Pb 82 lead 207.2 11.35
"""


def read_table(table: str) -> list[Element]:
    """Read rows of symbol, number, name, mass, density."""
    rows = (entry.split() for entry in re.split(r"[|\n]", table) if entry.strip())
    return [
        Element(symbol, int(number), name, float(mass), None if density == "-" else float(density))
        for symbol, number, name, mass, density in rows
    ]


ELEMENTS = {element.symbol: element for element in read_table(TABLE)}
NAMES = {element.number: element.name for element in ELEMENTS.values()}
NUMBERS = {name: number for number, name in NAMES.items()}
BUILDING_BLOCKS = ("H", "C", "N", "O", "F", "Na", "Al", "P", "S", "Cl", "K", "Ca", "Fe", "Cu", "Zn")
"""The elements of formulae."""


def working_mass(symbol: str) -> float:
    """The molar mass to the nearest integer, or (chlorine) half where an integer is more than 0.9% off."""
    mass = ELEMENTS[symbol].mass
    return float(round(mass)) if abs(round(mass) - mass) <= 0.009 * mass else round(2 * mass) / 2


CONSTANTS = {"h": 6.62607015e-34, "R": 8.31446261815324}

# Sizes in base units. Decimal units are the targets of conversions: a division by any other takes more arithmetic than
# knowledge.
DECIMAL_UNITS = {
    "m": {"um": 1e-6, "mm": 1e-3, "cm": 1e-2, "km": 1e3},
    "g": {"ug": 1e-6, "mg": 1e-3, "kg": 1e3},
    "s": {"ns": 1e-9, "us": 1e-6, "ms": 1e-3},
    "J": {"mJ": 1e-3, "kJ": 1e3, "MJ": 1e6},
    "Pa": {"hPa": 1e2, "kPa": 1e3, "MPa": 1e6},
    "L": {"uL": 1e-6, "mL": 1e-3, "cL": 1e-2},
}
OTHER_UNITS = {
    "m": {"in": 0.0254, "ft": 0.3048, "mi": 1609.344},
    "g": {"oz": 28.349523125, "lb": 453.59237},
    "s": {"min": 60.0, "h": 3600.0},
    "J": {"eV": 1.602176634e-19, "cal": 4.184},
    "Pa": {"torr": 133.322368, "atm": 101325.0},
    "L": {"gal": 3.785411784},
}


class Law(NamedTuple):
    """The product of `left` equals the product of `right` and the constant; `unseen` is the target of `ood`."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    constant: str
    unseen: str


LAWS = {
    "photons": Law(("E",), ("N", "f"), "h", unseen="f"),
    "gas": Law(("P", "V"), ("n", "T"), "R", unseen="T"),
    "wave": Law(("L", "p"), (), "h", unseen="p"),
}
EXPONENTS = {
    "E": (0, 2),  # J
    "N": (18, 20),
    "f": (14, 15),  # Hz
    "P": (4, 5),  # Pa
    "V": (-3, -2),  # m3
    "n": (-1, 0),  # mol
    "T": (2, 2),  # K
    "L": (-10, -9),  # m
    "p": (-25, -22),  # kg m/s
}
"""The range of the power of ten in which a given is drawn."""


def rounded(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.2e}")


def written(value: float) -> str:
    """Write with three significant digits at most: `2.13e-2`, and `3`, `2e1`."""
    digits, exponent = split_number(value)
    return f"{digits}e{exponent}" if exponent else digits


def split_number(value: float) -> tuple[str, int]:
    """Split into at most three significant digits, `2.13`, and the power of ten."""
    digits, exponent = f"{value:.2e}".split("e")
    return digits.rstrip("0").rstrip("."), int(exponent)


Recall = Callable[[str, float, Sequence[float]], float]
"""What somebody believes: (name of the fact, its true value, the values it may be mistaken for) -> value."""


def believing(beliefs: Mapping[str, float]) -> Recall:
    """Somebody who knows every fact, but for these."""
    return lambda fact, truth, others: beliefs.get(fact, truth)


def scaled(truth: float) -> tuple[float, ...]:
    """What a quantity is mistaken for."""
    return tuple(rounded(truth * factor) for factor in (0.1, 0.5, 0.7, 1.5, 2, 10))


def shifted(number: int) -> tuple[int, ...]:
    """What an atomic number is mistaken for: its neighbours in the table."""
    numbers = list(NAMES)
    place = numbers.index(number)
    return tuple(other for other in numbers[max(0, place - 3) : place + 4] if other != number)
