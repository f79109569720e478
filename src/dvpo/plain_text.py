"""Text of models and users as text: nothing in it acts on a terminal, a page or the order of what stands beside it.

Beside it figures, as every view writes them.
"""

import math
import sys
import unicodedata
from typing import Any

from rich.console import Console

KEPT = "\n\t"
JOINERS = "\u200c\u200d"
"""Format characters that only join or part letters and emoji, which are wrong without them."""
CONTROL_PICTURES = 0x2400


def visible(text: str) -> str:
    """The text with a visible sign for every character that is none itself.

    Control characters become their pictures (ESC is one sign and colours nothing), characters that turn the writing's
    direction and other invisible ones, and halves of surrogate pairs, which no file can hold, their code, such as
    \\u202e.
    """
    return "".join(_sign(character) for character in text) if not text.isprintable() else text


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters of a text, and how many were left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _sign(character: str) -> str:
    if character in KEPT or character in JOINERS or character.isprintable():
        return character
    number = ord(character)
    if number < 0x20:
        return chr(CONTROL_PICTURES + number)
    if number == 0x7F:
        return chr(CONTROL_PICTURES + 0x21)
    if unicodedata.category(character) == "Zs":
        return " "
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def interval(value: float | None, low: float | None, high: float | None, *, share: bool = True) -> str:
    """A share in per cent, `45.3 [39, 51]`, else in its own unit, `3.2 [2.87, 3.5]`; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    scale, form, edge = (100, ".1f", ".0f") if share else (1, ".3g", ".3g")
    text = f"{scale * value:{form}}"
    return text if low is None or high is None else f"{text} [{scale * low:{edge}}, {scale * high:{edge}}]"


def plain_console(**options: Any) -> Console:
    """A terminal that prints a path as it is: rich would take brackets in it for markup.

    Args:
        options: of `rich.console.Console`.
    """
    return Console(markup=False, **options)


def table_console() -> Console:
    """A plain console that, where no terminal sets the width, does not wrap the columns of a table."""
    return plain_console() if sys.stdout.isatty() else plain_console(width=160)
