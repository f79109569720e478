"""What each setting means, what it may be and what it is: read from the config's own source (`dvpo settings`)."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from dvpo.config import Config
from dvpo.errors import InputError


class Setting(NamedTuple):
    """One key of a config."""

    name: str
    """`advantage.lam`."""
    value: str
    kind: str
    """What it may be, in words."""
    meaning: str


WORDS = {
    "Share": "from 0 to 1",
    "Rate": "from 0 to below 1",
    "Tail": "above 0, up to 1",
    "Weight": "0 or more",
    "Positive": "above 0",
    "Finite": "a number",
    "Count": "1 or more",
    "CountOrZero": "0 or more",
    "bool": "true or false",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "None": "null",
}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def all_settings(section: Any, prefix: str = "") -> Iterator[Setting]:
    """Every key of a config or of a section of it, in its order."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from all_settings(value, f"{prefix}{field.name}.")
        else:
            yield explain(section, field.name, prefix)


def explain(section: Any, name: str, prefix: str = "") -> Setting:
    """A field of a section, where its class says it."""
    owner = next(kind for kind in type(section).__mro__ if name in inspect.get_annotations(kind))
    kind, meaning = _stated(owner)[name]
    return Setting(f"{prefix}{name}", _shown(getattr(section, name)), kind, meaning)


def settings_text(config: Config, words: Sequence[str]) -> str:
    """The settings whose name holds one of the words, or whose meaning does where no name does; all for no words.

    Raises:
        InputError: nothing holds any of them.
    """
    settings = list(all_settings(config))
    named = [each for each in settings if not words or any(word in each.name for word in words)]
    found = named or [each for each in settings if any(word.lower() in each.meaning.lower() for word in words)]
    if not found:
        sections = sorted({each.name.split(".")[0] for each in settings if "." in each.name})
        raise InputError(
            f"no setting's name or meaning holds {' or '.join(words)}: try a section ({', '.join(sections)}), or "
            "no word for all settings"
        )
    return "\n".join(
        f"{each.name} = {each.value}\n" + textwrap.fill(f"{each.meaning} ({each.kind})".strip(), 100, **INDENT) + "\n"
        for each in found
    )


INDENT: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}


@cache
def _stated(section: type) -> dict[str, tuple[str, str]]:
    """What a section's source says of each field: its type in words, and the text below it."""
    tree = ast.parse(inspect.getsource(section))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found[statement.target.id] = (_in_words(statement.annotation), text)
    return found


def _in_words(annotation: ast.expr) -> str:
    """What a setting may be."""
    if isinstance(annotation, ast.BinOp):
        return f"{_in_words(annotation.left)}, or {_in_words(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        kind = ast.unparse(annotation.value)
        inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if kind == "Literal":
            return "one of " + ", ".join(f"`{ast.literal_eval(value)}`" for value in inside)
        if kind == "tuple":
            return "a list"
        limits = [word for part in inside[1:] if isinstance(part, ast.Call) for word in part.keywords]
        return " and ".join(
            f"{BOUNDS[w.arg]} {ast.unparse(w.value).replace(' ** ', '^')}" for w in limits if w.arg in BOUNDS
        ) or _in_words(inside[0])
    return WORDS.get(ast.unparse(annotation), ast.unparse(annotation))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return str(list(value))
    return str(value) or '""'
