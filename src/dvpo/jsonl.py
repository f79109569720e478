"""Lines of JSON from outside: whatever is no object of plain, sound text is refused by its line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvpo.errors import InputError

ONE_OBJECT = "write one JSON object a line"
SHOWN = 60
"""So much of a bad line stands in the message."""


def json_objects(path: Path, field: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place (`train.jsonl, line 7`); empty lines are left out.

    Args:
        path: a file of UTF-8 text, with a byte-order mark or without. Lines end at a line feed alone: U+2028 and its
            like may stand in a text.
        field: the setting that names the file, for messages.

    Raises:
        InputError: a line that is no UTF-8, no JSON or no object; an object with a key twice, or with half a
            surrogate pair, which no tokenizer and no file takes.
        OSError: a file that cannot be read.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            where = f"{field}: {place}" if field else place
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{where} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
            if text.strip():
                yield place, _object(text.rstrip("\r\n"), where)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        begin = f"begins with {text[:SHOWN]!r}" if len(text) > SHOWN else f"says {text!r}"
        raise InputError(f"{where} is no JSON ({error.msg}, column {error.colno}): it {begin}; {ONE_OBJECT}") from None
    except _RepeatedKeyError as error:
        raise InputError(f"{where} has the key {error} twice; keep one of them") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; {ONE_OBJECT}") from None
    except ValueError:  # Python reads integers of at most 4,300 digits
        raise InputError(f"{where} has an integer of thousands of digits; write it as text") from None
    if not isinstance(row, dict):
        shown = repr(row)
        raise InputError(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}; {ONE_OBJECT}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} has half a surrogate pair (\\ud800 to \\udfff); write the whole character") from None
    return row


class _RepeatedKeyError(Exception):
    """An object names a key twice; which of the two values is meant, nobody can tell."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise _RepeatedKeyError(repr(key))
        row[key] = value
    return row
