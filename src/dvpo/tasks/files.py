"""The user's own data as a task: JSONL, parquet, or a folder saved by `datasets`, with a column of prompts.

Every row is read and checked before anything else happens, so that a run never ends at row 40,000. All
columns but the prompt are handed to the reward functions.
"""

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.jsonl import json_objects
from dvpo.rewards import STANDARD_ARGUMENTS, GuardedReward, headline
from dvpo.seeding import derive_uniform
from dvpo.tasks import Answer, Example, Message, Prompt, Reward, SplitTask

ENDINGS = (".jsonl", ".json", ".parquet")
Row = tuple[str, Mapping[str, Any]]
"""Where the row stands (`train.jsonl, line 7`), and its columns."""


class FilesTask(SplitTask):
    """A task read from files; the truth is unknown unless a function for it is given.

    - An example's id is its `id` column if there is one. Else it is a hash of the prompt, followed by `-2`,
      `-3`, ... when the prompt is repeated: adding or removing other rows does not change it.
    - Without `id_path` a prompt is held out for the split `id` when a hash of it falls below `held_out`, or,
      if none does, the prompt with the lowest hash. All repetitions of a prompt are thus on one side, and once
      a hash falls below, no row changes sides because others come or go.
    - `train` is in the order of its file, `id` and `ood` in that of a hash of the prompt.

    Args:
        path: a `.jsonl` file (or `.json`, one object a line), a `.parquet` file, or a `save_to_disk` folder.
        id_path: the held-out examples of the same distribution.
        ood_path: held-out examples of another distribution.
        prompt_column: holds a string, or a list of messages with `role` and `content`.
        held_out: the share of prompts held out when there is no `id_path`, in [0, 1); 0 holds nothing out.
        truth: the verified reward, a function as in `dvpo.rewards` or its name `module:function`.
        answer_pattern: a regular expression of the final answer in a response; None: the whole response.

    Raises:
        InputError: a missing or unreadable file, a bad row, an empty data set, a setting out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        id_path: str | Path | None = None,
        ood_path: str | Path | None = None,
        prompt_column: str = "prompt",
        held_out: float = 0.05,
        truth: str | Callable[..., Any] | None = None,
        answer_pattern: str | None = None,
    ) -> None:
        if not 0 <= held_out < 1:
            raise InputError(f"task.held_out: {held_out!r} is no share; give a number from 0 to below 1")
        self._answer = None if answer_pattern is None else _compiled(answer_pattern)
        self.name = Path(path).stem
        sources = {
            "train": ("task.path", path),
            "id": ("task.id_path", id_path),
            "ood": ("task.ood_path", ood_path),
        }
        self._splits: dict[str, list[Example]] = {
            split: _examples(_rows(Path(source), field), field, prompt_column)
            for split, (field, source) in sources.items()
            if source is not None
        }
        if id_path is not None:
            _refuse_another_form(self._splits, f"task.id_path = {id_path}")
        self._splits = _with_the_same_columns(self._splits, sources)
        if id_path is None and held_out > 0:
            self._splits |= _hold_out(self._splits["train"], held_out, path)
        if of_files := [split for split in ("id", "ood") if sources[split][1] is not None]:
            trained = {_prompt_hash(example.prompt) for example in self._splits["train"]}
            for split in of_files:
                _warn_of_trained(self._splits[split], trained, " = ".join(map(str, sources[split])))
        # Evaluations take the first of a split: in the file's order, those of a single topic where it is sorted.
        self._splits |= {split: _by_hash(self._splits[split]) for split in ("id", "ood") if split in self._splits}
        self.columns = list(self._splits["train"][0].columns)
        self.knows_truth = truth is not None
        self._warned = False
        self._reader = _reader([example.columns.get("answer") for example in self._splits["train"]])
        # Its time limit is the guard's own, 30 seconds, for each call of about 64 responses.
        columns = self.columns
        self._truth = None if truth is None else GuardedReward(truth, columns=columns, field="task.truth", most=64)

    def final_answer(self, text: str) -> Answer | None:
        """The last match of `answer_pattern`, its first group if it has one; else the response without its margins.

        Of the type of the column `answer`, where that holds numbers or truth values alone: a text that is none of these
        is no answer, and a label "82" would equal no 82.
        """
        if self._answer is None:
            found = text.strip()
        else:
            *_, last = [None, *self._answer.finditer(text)]
            found = "" if last is None else last[1 if self._answer.groups else 0] or ""
        try:
            return self._reader(found) if found else None
        except (ValueError, KeyError):
            return None

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        if self._truth is None:
            return [None] * len(prompts)
        judged = self._truth(prompts, completions, completion_ids, columns)
        lost = [fault for fault in judged.faults if not fault.cured]
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"task.truth failed for {len({fault.index for fault in lost})} of {len(prompts)} responses, whose "
                f"truth counts as unknown; first: {headline(lost[0])}. Said once",
                stacklevel=2,
            )
        return judged.rewards


def _reader(answers: Iterable[Any]) -> Callable[[str], Answer]:
    """From a text to an answer of the type that all of these have; ValueError or KeyError if it is none."""
    kinds = {type(answer) for answer in answers if answer is not None}
    if kinds == {bool}:
        return lambda text: {"true": True, "false": False}[text.strip().lower()]
    if kinds == {int}:
        return int
    return float if kinds and kinds <= {int, float} else str


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"task.answer_pattern: {pattern!r} is no regular expression ({error}); mend it, or quote it in the YAML"
        ) from None


def _hold_out(examples: list[Example], share: float, path: str | Path) -> dict[str, list[Example]]:
    levels = [derive_uniform("held out", _prompt_hash(example.prompt)) for example in examples]
    if len(set(levels)) < 2:
        raise InputError(
            f"task.path: {path} holds a single prompt, of which none is left to evaluate on; "
            f"name held-out examples in task.id_path or set task.held_out=0"
        )
    lowest, highest = min(levels), max(levels)
    kept: list[Example] = []
    held: list[Example] = []
    for example, level in zip(examples, levels, strict=True):
        is_held = level == lowest or (level < share and level < highest)  # neither side is ever empty
        (held if is_held else kept).append(example)
    return {"train": kept, "id": held}


def _refuse_another_form(splits: Mapping[str, list[Example]], said: str) -> None:
    """A reward function is given completions in the form of their prompts, and may know none but training's."""
    trained = {isinstance(example.prompt, str) for example in splits["train"]}
    for example in splits["id"]:
        if (is_text := isinstance(example.prompt, str)) not in trained:
            forms = ("string", "message list") if is_text else ("message list", "string")
            raise InputError(
                f"{said}: the prompt {_short(example.prompt)} is a {forms[0]}, those in task.path are each a "
                f"{forms[1]}, and so are the completions that a reward function is given: write all in one form"
            )


def _warn_of_trained(held: list[Example], trained: set[str], said: str) -> None:
    """Say how many held-out prompts are trained on, by their hashes; `said` names their field and file."""
    if shared := sum(_prompt_hash(example.prompt) in trained for example in held):
        warnings.warn(
            f"{said}: {shared} of {len(held)} held-out prompts ({100 * shared / len(held):.1f}%) stand word for word "
            f"in task.path, and how well they are answered may be memory: remove them from one of the two",
            stacklevel=3,
        )


def _by_hash(examples: list[Example]) -> list[Example]:
    """In an order that each prompt's hash decides: no two change places because others come or go."""
    return sorted(examples, key=lambda example: derive_uniform("order", _prompt_hash(example.prompt)))


def _with_the_same_columns(
    splits: Mapping[str, list[Example]], sources: Mapping[str, tuple[str, Any]]
) -> dict[str, list[Example]]:
    """Give each example every column, None where its row had none: reward functions always get the same.

    A column that some rows lack may be a slip of the pen, which would pay 0 for every answer to them: it is said.
    """
    names = dict.fromkeys(name for examples in splits.values() for e in examples for name in e.columns)
    for split, examples in splits.items():
        for name in names:
            if lacking := [example.id for example in examples if name not in example.columns]:
                warnings.warn(
                    f"{' = '.join(map(str, sources[split]))}: {len(lacking)} of {len(examples)} rows have no column "
                    f"{name!r}, first that of prompt {lacking[0]}; reward functions get None there: mend the name, or "
                    "write null where None is meant",
                    stacklevel=3,
                )
    return {
        split: [replace(e, columns={name: e.columns.get(name) for name in names}) for e in examples]
        for split, examples in splits.items()
    }


# From rows to examples.


def _examples(rows: Iterable[Row], field: str, prompt_column: str) -> list[Example]:
    examples: list[Example] = []
    places: dict[str, str] = {}
    repetitions: dict[str, int] = {}
    ids_are_given = False
    for place, row in rows:
        prompt = _prompt(row, prompt_column, f"{field}: {place}")
        if not examples:
            ids_are_given = "id" in row
        if ids_are_given or "id" in row:
            name = _given_id(row, ids_are_given, f"{field}: {place}")
        else:
            key = _prompt_hash(prompt)
            repetitions[key] = repetitions.get(key, 0) + 1
            name = key if repetitions[key] == 1 else f"{key}-{repetitions[key]}"
        if name in places:
            raise InputError(
                f"{field}: {place} has the id {name!r} of {places[name]}; make the ids unique, or remove the "
                f"column to have them made from the prompts"
            )
        places[name] = place
        examples.append(Example(name, prompt, _columns(row, prompt_column, f"{field}: {place}")))
    return examples


def _columns(row: Mapping[str, Any], prompt_column: str, where: str) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if name != prompt_column}
    if taken := [name for name in (*STANDARD_ARGUMENTS, "self") if name in columns]:
        raise InputError(f"{where} has a column {taken[0]!r}, an argument of every reward function or task; rename it")
    return columns


def _given_id(row: Mapping[str, Any], ids_are_given: bool, where: str) -> str:
    name = row.get("id")
    remedy = "give every row a string or an integer, or remove the column"
    if not ids_are_given:
        raise InputError(f"{where} has the id {name!r}, but the first row has none; {remedy}")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InputError(f"{where} has the id {name!r}; {remedy}")
    return str(name)


def _prompt(row: Mapping[str, Any], column: str, where: str) -> Prompt:
    if column not in row:
        raise InputError(_no_column(where, column, row, "task.prompt_column"))
    prompt = row[column]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where} has an empty {column!r}; give it a text or remove the row")
        return prompt
    if not isinstance(prompt, list):
        raise InputError(
            f"{where} has {_short(prompt)} as {column!r}; give a string, or a list of messages with role and content"
        )
    messages = [_message(message, f"{where}, {column}[{at}]") for at, message in enumerate(prompt)]
    if not any(message["content"].strip() for message in messages):
        raise InputError(f"{where} has a {column!r} without any text; give it a message with content or remove the row")
    return messages


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {_short(message)}; give a message with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise InputError(
                f"{where} has {_short(message[key]) if key in message else 'nothing'} as {key!r}; "
                f"give every message a text as its role and its content"
            )
    return {key: value for key, value in message.items() if value is not None}  # parquet fills gaps with None


def _no_column(where: str, column: str, names: Iterable[str], field: str) -> str:
    names = list(names)
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    found = ", ".join(map(repr, names)) or "none at all"
    return f"{where} has no column {column!r} among its columns ({found}); {hint}set {field}"


def _prompt_hash(prompt: Prompt) -> str:
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# From files to rows.


def _rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of a file or folder, as they stand there; InputError if there are none."""
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        names = {p.stem: p.name for p in siblings if p.suffix in ENDINGS or p.is_dir()}
        near = difflib.get_close_matches(path.stem, names, n=1)  # an ending that both have is no likeness
        remedy = (
            f"did you mean {names[near[0]]!r}?" if near else "check the path, which starts at the working directory"
        )
        raise InputError(f"{field}: there is no file or folder {str(path)!r}; {remedy}")
    if path.is_dir():
        rows = _saved_rows(path, field)
    elif path.suffix in (".jsonl", ".json"):
        rows = json_objects(path, field)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, field)
    else:
        raise InputError(
            f"{field}: cannot tell the format of {str(path)!r} by its ending; "
            f"give a .jsonl or .parquet file, or a folder made by save_to_disk of datasets"
        )
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        raise InputError(f"{field}: {str(path)!r} cannot be read ({error.strerror}); check its rights") from None
    if empty:
        raise InputError(f"{field}: {str(path)!r} is empty; give it at least one row")


def _parquet_rows(path: Path, field: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _data_extra(path, field) from None
    try:
        rows = (row for lot in parquet.ParquetFile(path).iter_batches() for row in lot.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{field}: {str(path)!r} is no readable parquet file ({_first_line(error)}); write it again"
        ) from None


def _saved_rows(path: Path, field: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise _data_extra(path, field) from None
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever a damaged folder leads it to
        raise InputError(
            f"{field}: the folder {str(path)!r} holds no data set ({_first_line(error)}); "
            f"make it with save_to_disk of datasets"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        raise InputError(
            f"{field}: the folder {str(path)!r} holds the splits {', '.join(data)}; "
            f"give one of them, {str(path / next(iter(data)))!r} for example"
        )
    for number, row in enumerate(data, start=1):
        yield f"{path}, row {number}", row


def _data_extra(path: Path, field: str) -> InputError:
    return InputError(f"{field}: reading {str(path)!r} needs a further package; run `pip install dvpo[data]`")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
