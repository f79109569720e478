"""Nested plain values on their way into dataclasses: read, overridden, merged, and held against the known keys."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dvpo.errors import InputError
from dvpo.safe_yaml import parse_yaml, problem

hints_of = cache(typing.get_type_hints)
"""Once a class: a study of 756 cells has its config made so often."""

LONGEST_SHOWN = 300
"""Characters of a value that a message shows."""


def read_yaml(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """The `key: value` lines of a file; InputError if there are none to read."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{what} {path} cannot be read ({reason}): check the path") from None
    except yaml.YAMLError as error:
        raise InputError(f"{what} {path} is not valid YAML{problem(error)}: mend the syntax") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{what} {path} holds a {type(values).__name__}: it must hold `key: value` lines")
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def set_dotted(values: dict[str, Any], override: str) -> None:
    """Put one `key.sub=value` override into the values; InputError if it is none."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {shown(override)} has no `key=value` form: write for example critic.alpha=0.1")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {shown(override)}: the value is not valid YAML{problem(error)}; quote it") from None
    if "#" in text and "#" not in str(value):
        raise InputError(f"override {shown(override)}: YAML reads what follows # as a comment; write {key}='\"...\"'")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = {} if node.get(parent) is None else node[parent]
        node[parent] = child
        if not isinstance(child, dict):
            raise InputError(f"override {shown(override)}: {parent!r} is a value and holds no {leaf!r}: check the key")
        node = child
    node[leaf] = value


def checked(values: Mapping[Any, Any], kind: type, root: type, prefix: str = "") -> dict[str, Any]:
    """The values, with empty sections in place of headings that nothing stands below.

    Args:
        values: of one section.
        kind: the section's dataclass.
        root: the dataclass of the whole, searched for what an unknown key may have meant.
        prefix: the section's dotted name and a dot.

    Raises:
        InputError: an unknown key, a value where a section is wanted, or what YAML made a yes or no of.
    """
    known, result = hints_of(kind), dict(values)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            remedy = _suggest(str(key), prefix, sorted(map(str, known)), root)
            raise InputError(f"unknown config key {name[:LONGEST_SHOWN]}: {remedy}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, Mapping | None):
                leaf, text = _leaf(known[key], value)
                raise InputError(
                    f"config key {name} = {shown(value)} is a section: write {name}.{leaf}={text}, in a file {key}: "
                    f"{{{leaf}: {text}}}"
                )
            result[key] = checked(value or {}, known[key], root, f"{name}.")  # type: ignore[arg-type]
        elif isinstance(value, list | tuple) and (entry := _listed_section(known[key])):
            result[key] = [
                checked(item, entry, root, f"{name}.{i}.") if isinstance(item, Mapping) else item
                for i, item in enumerate(value)
            ]
        elif value is False and "off" in get_args(known[key]):
            result[key] = "off"  # YAML reads the bare word so
        elif isinstance(value, bool) and known[key] is not bool:
            raise InputError(f"{name} = {shown(value)} is not valid: it is no yes-or-no setting")
    return result


def _leaf(kind: Any, value: Any) -> tuple[str, str]:
    """What was meant by a value in a section's place: a text is the first setting, where that is one (`task.name`)."""
    first, hint = next(iter(hints_of(kind).items()))
    return (first, shown(value)) if isinstance(value, str) and hint is str else ("key", "value")


def _listed_section(hint: Any) -> type | None:
    """The section that a list of sections holds; None for any other setting."""
    entry = next(iter(get_args(hint)), None)
    return entry if dataclasses.is_dataclass(entry) else None  # type: ignore[return-value]


def _suggest(key: str, prefix: str, section_keys: list[str], root: type) -> str:
    """The nearest key of the same section, else the same key in another section, else the section's keys."""
    head, colon, tail = key.partition(":")
    if colon and head in section_keys:
        return f"write a space behind the colon, {head}: {tail}"
    everywhere = list(all_keys(root))
    near = difflib.get_close_matches(key, section_keys, n=1, cutoff=0.7)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [k for k in everywhere if k.rsplit(".", 1)[-1] == key]
    if not elsewhere:
        elsewhere = difflib.get_close_matches(prefix + key, everywhere, n=1, cutoff=0.6)
    if elsewhere:
        return f"did you mean {min(elsewhere, key=lambda k: k.count('.'))}?"
    return "the keys here are " + ", ".join(section_keys)


def all_keys(kind: type, prefix: str = "") -> Iterable[str]:
    """The dotted name of every setting below a dataclass."""
    for name, hint in hints_of(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name


def shown(value: Any) -> str:
    """A value as messages name it."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    """All of both; where both have a value, the strong one's. A heading that nothing stands below says nothing."""
    merged = deep_copy(weak)
    for key, value in strong.items():
        section = isinstance(merged.get(key), Mapping)
        if section and value is None:
            continue
        merged[key] = merge(merged[key], value) if section and isinstance(value, Mapping) else value
    return merged


def deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same mappings anew, so that an override changes nobody else's."""
    return {k: deep_copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def one_sentence(error: ValidationError) -> str:
    """Pydantic's findings as `field = value: what is wrong`, joined."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ").replace("tuple", "list")
        what = message[0].lower() + message[1:]
        parts.append(f"{field} = {shown(item['input'])} is not valid: {what}" if field else message)
    return "; ".join(parts)
