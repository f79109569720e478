"""The token view in a terminal: coloured tokens, and a table of the critic's figures."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dvpo.plain_text import visible
from dvpo.report_texts import messages

TITLES = {"advantages": "advantage", "value": "value", "width": "width"}
POSITIVE, NEGATIVE, SEQUENCE = (86, 140, 240), (240, 150, 80), (165, 125, 225)
"""What white turns into; the text on it is black, which is readable on any terminal's ground."""
BARS = "▁▂▃▄▅▆▇█"
LISTED = 48
"""Tokens in the table; of a longer response the ones with the most of the figure shown."""
LAW_POINTS = 8


def print_view(console: Console, row: dict[str, Any], title: str, colour: str) -> None:
    """Print a record of `token_view` as a conversation and a table.

    Args:
        console: where.
        row: the record.
        title: what it is of.
        colour: the figure that colours the tokens, if the record has it: advantages, value or width.
    """
    known = [name for name in TITLES if row.get(name)]
    colour = colour if colour in known else next(iter(known), "")
    console.rule(Text(visible(title)))
    for message in messages(row["prompt"]):
        console.print(Text.assemble((f"{message['role']}  ", "dim"), message["text"]))
    values: Sequence[float | None] = row.get(colour) or [None] * len(row["tokens"])
    console.print(_coloured(row, values, colour))
    console.print(Text(_caption(row, values, colour), style="dim"))
    if known:
        console.print(_table(row, values))


def _coloured(row: dict[str, Any], values: Sequence[float | None], colour: str) -> Text:
    text, turn = Text(), None
    for token, at, value in zip(row["tokens"], row["turns"], values, strict=True):
        if at != turn:
            text.append("\n" if turn is not None else "")
            text.append("policy  " if at >= 0 else "environment  ", style="dim")
            turn = at
        text.append(visible(token), style=_style(value, values, colour))
    return text


def _style(value: float | None, values: Sequence[float | None], colour: str) -> Style:
    if value is None:
        return Style()
    known = [v for v in values if v is not None]
    if colour == "advantages":
        end, part = (POSITIVE if value >= 0 else NEGATIVE), abs(value) / (max(map(abs, known)) or 1.0)
    else:
        low, high = min(known), max(known)
        end, part = SEQUENCE, (value - low) / (high - low) if high > low else 0.5
    mixed = [round(255 + part * (channel - 255)) for channel in end]
    return Style.parse(f"black on rgb({mixed[0]},{mixed[1]},{mixed[2]})")


def _caption(row: dict[str, Any], values: Sequence[float | None], colour: str) -> str:
    rewards = [f"{name} {_number(row.get(name))}" for name in ("observed", "true")]
    known = [value for value in values if value is not None]
    scale = [f"colour: {TITLES[colour]} from {_number(min(known))} to {_number(max(known))}"] if known else []
    return ", ".join([*rewards, *scale])


def _table(row: dict[str, Any], values: Sequence[float | None]) -> Table:
    places = [index for index, turn in enumerate(row["turns"]) if turn >= 0]
    listed = sorted(sorted(places, key=lambda index: -abs(values[index] or 0.0))[:LISTED])
    columns = [("advantages", "advantage"), ("value", "value"), ("width", "width"), ("lower", "lower tail"),
               ("upper", "upper tail")]  # fmt: skip
    columns = [(key, name) for key, name in columns if row.get(key)]
    has_law = bool(row.get("width"))
    caption = f"the {LISTED} tokens with the most of it" if len(places) > LISTED else None
    table = Table(caption=caption)
    for name in ("#", "token", *(name for _, name in columns), *(["law"] if has_law else [])):
        table.add_column(name, justify="left" if name in ("token", "law") else "right")
    atoms = [atom for index in places for head in row["quantiles"][index] for atom in head] if has_law else []
    for index in listed:
        cells = [Text(str(index + 1)), Text(visible(repr(row["tokens"][index])[1:-1]))]
        cells += [Text(_number(row[key][index])) for key, _ in columns]
        cells += [Text(_bars(row["quantiles"][index], min(atoms), max(atoms)))] if has_law else []
        table.add_row(*cells)
    return table


def _bars(heads: Sequence[Sequence[float]], low: float, high: float) -> str:
    """The ensemble's quantile function as a row of bars, from the lowest to the highest level."""
    ensemble = sorted(sum(column) / len(heads) for column in zip(*heads, strict=True))
    points = [ensemble[round(i * (len(ensemble) - 1) / (LAW_POINTS - 1))] for i in range(LAW_POINTS)]
    size = (high - low) or 1.0
    return "".join(BARS[min(int((point - low) / size * len(BARS)), len(BARS) - 1)] for point in points)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
