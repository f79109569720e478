"""YAML from outside: plain values only, of a bounded size, and every way in which it can be wrong is one error."""

from typing import Any

import yaml
from yaml.nodes import MappingNode

MOST_VALUES = 100_000
"""Aliases can make a few lines stand for billions of values."""

LONGEST_REASON = 300
"""Characters; a reason may quote a key of any length."""


class _Loader(yaml.SafeLoader):
    """The safe loader, without its habit of taking the last of two equal keys."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", nodes[i].start_mark
                )
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists, numbers, texts, dates; never an object of a class that it names.

    Raises:
        yaml.YAMLError: whatever is wrong with it; where it has a `problem_mark`, that says at which line.
    """
    try:
        value = yaml.load(text, _Loader)
        _refuse_what_no_file_takes(value)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except Exception as error:  # 2001-13-01, 0b, ...: the library passes on what its conversions raise
        raise yaml.YAMLError(str(error)) from None
    return value


def _refuse_what_no_file_takes(value: Any) -> None:
    """Raise at a text with NUL or half a surrogate pair, and at more values than anybody writes."""
    waiting, seen = [value], 0
    while waiting:
        item = waiting.pop()
        seen += 1
        if seen + len(waiting) > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values, those that aliases repeat included")
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif isinstance(item, str) and ("\0" in item or any("\ud800" <= c <= "\udfff" for c in item)):
            raise yaml.YAMLError(f"the text {item[:40]!r} holds a NUL or half a surrogate pair")


def problem(error: yaml.YAMLError) -> str:
    """What is wrong, in a few words: ` at line 3 (the key 'seed' stands there twice)`."""
    mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    if isinstance(error, yaml.scanner.ScannerError):  # which sees what is missing lines behind where it should stand
        mark = error.context_mark or mark
    line = f" at line {mark.line + 1}" if mark else ""
    return f"{line} ({' '.join(said.split())[:LONGEST_REASON]})" if said else line
