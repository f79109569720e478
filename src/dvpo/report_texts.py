"""The responses that a page carries with it, as plain data for its script: texts, rewards, tokens.

Everything that a model or a user wrote goes through `visible`. The script sets it as text, never as markup.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dvpo.plain_text import clipped, visible
from dvpo.report_data import Run
from dvpo.study_results import Row

MOST_ROWS = 1500
"""Completions on a page; of more, those of evenly spaced steps are kept."""
LONGEST_TEXT = 120_000
"""Characters of one text."""
TEXT_ROOM, TOKEN_ROOM = 2_000_000, 2_000_000
"""Bytes that texts and token records may take, so that a page stays below five megabytes."""

VIEW_COLUMNS = (
    *("tokens", "turns", "advantages", "value", "width", "lower", "upper"),
    *("quantiles", "levels", "alpha", "beta"),
)


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Runs, prompts, completions and token views of a page; each completion names the others by index.

    `left_out` counts the completions and token views for which there was no room.
    """
    prompts = _Prompts()
    rows = [(index, row, True) for index, run in enumerate(runs) for row in run.tokens]
    kept_rows = _within(_latest_first(rows), TOKEN_ROOM)
    known = {_key(index, row) for index, row, _ in kept_rows}
    plain = [(index, row, False) for index, run in enumerate(runs) for row in run.completions]
    texts = {_key(index, row): row["completion"] for index, row, _ in plain}
    plain = [entry for entry in plain if _key(entry[0], entry[1]) not in known]
    kept_plain = _within(_spaced(plain, min(MOST_ROWS, TEXT_ROOM // _usual_size(plain))), TEXT_ROOM)
    completions, views = [], []
    for index, row, has_tokens in sorted([*kept_rows, *kept_plain], key=lambda e: (e[1]["step"], e[0])):
        if has_tokens:
            views.append(view_of(row))
        # The tokens of older runs came without their text, and do not say which of them are end tokens.
        text = row["completion"] if "completion" in row else texts.get(_key(index, row), "".join(row["tokens"]))
        view = len(views) - 1 if has_tokens else -1
        completions.append(_completion(index, row, str(text), prompts.place(row["prompt"]), view))
    return {
        "runs": [visible(run.label) for run in runs],
        "prompts": prompts.texts,
        "completions": completions,
        "views": views,
        "left_out": {
            "completions": len(plain) - len(kept_plain),
            "views": len(rows) - len(kept_rows),
        },
    }


def view_of(row: Row) -> dict[str, Any]:
    """A row of tokens.jsonl as the script takes it."""
    view = {name: row[name] for name in VIEW_COLUMNS if row.get(name) is not None}
    return view | {"tokens": [visible(text) for text in row["tokens"]]}


def messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages of plain text."""
    if isinstance(prompt, str):
        return [{"role": "prompt", "text": clipped(visible(prompt), LONGEST_TEXT)}]
    return [
        {"role": visible(str(m.get("role", ""))), "text": clipped(visible(str(m.get("content", ""))), LONGEST_TEXT)}
        for m in prompt
        if isinstance(m, Mapping)
    ]


def script_json(data: Any) -> str:
    """JSON that may stand in a script element: no character of it can end one or begin another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


Entry = tuple[int, Row, bool]
"""(index of the run, row, whether it has tokens)"""


class _Prompts:
    """Prompts, each once: the samples of a step share theirs."""

    def __init__(self) -> None:
        self.texts: list[list[dict[str, str]]] = []
        self._places: dict[str, int] = {}

    def place(self, prompt: Any) -> int:
        key = json.dumps(prompt, sort_keys=True)
        if key not in self._places:
            self._places[key] = len(self.texts)
            self.texts.append(messages(prompt))
        return self._places[key]


def _completion(index: int, row: Row, text: str, prompt: int, view: int) -> dict[str, Any]:
    return {
        "run": index,
        "step": row["step"],
        "id": visible(str(row["prompt_id"])),
        "visit": row["visit"],
        "sample": row["sample"],
        "prompt": prompt,
        "text": clipped(visible(text), LONGEST_TEXT),
        "observed": row["observed"],
        "true": row["true"],
        "view": view,
    }


def _key(index: int, row: Row) -> tuple[Any, ...]:
    return index, row["step"], row["prompt_id"], row["visit"], row["sample"]


def _latest_first(entries: Iterable[Entry]) -> list[Entry]:
    """The first sample of every step before the second, late steps before early ones."""
    return sorted(entries, key=lambda entry: (entry[1]["sample"], -entry[1]["step"]))


def _spaced(entries: Sequence[Entry], most: int) -> list[Entry]:
    """All rows of evenly spaced steps, so many that no more than about `most` rows are left."""
    steps = sorted({row["step"] for _, row, _ in entries})
    every = -(-len(entries) // most) if most else 1
    kept = set(steps[:: max(every, 1)]) | set(steps[-1:])
    return [entry for entry in entries if entry[1]["step"] in kept]


def _usual_size(entries: Sequence[Entry]) -> int:
    """Bytes of an entry, by some hundred of them."""
    some = entries[:: max(len(entries) // 100, 1)]
    return sum(len(json.dumps(row)) for _, row, _ in some) // max(len(some), 1) + 1


def _within(entries: Iterable[Entry], room: int) -> list[Entry]:
    """The first entries that fit."""
    kept = []
    for entry in entries:
        size = len(json.dumps(entry[1]))
        if size <= room:
            room -= size
            kept.append(entry)
    return kept
