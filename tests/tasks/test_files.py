"""The user's own data: what is read, how it is split, and one clear sentence for everything that can be wrong."""

import builtins
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from dvpo.errors import InputError
from dvpo.tasks.files import FilesTask

CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "2+2?"}]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: bytes | list[Any], name: str = "train.jsonl") -> Path:
        lines = content if isinstance(content, bytes) else "".join(json.dumps(r) + "\n" for r in content).encode()
        (tmp_path / name).write_bytes(lines)
        return tmp_path / name

    return write


def many(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + {i}?", **columns} for i in range(count)]


# What is read.


def test_rows_become_examples_with_all_other_columns(write: Write) -> None:
    rows = [{"prompt": "2+2=", "answer": "4", "id": 7}, {"prompt": CHAT, "answer": "4", "level": 2, "id": "b"}]
    with pytest.warns(
        UserWarning, match=r"task.path = .*: 1 of 2 rows have no column 'level', first that of prompt 7;"
    ):
        task = FilesTask(write(rows), held_out=0)
    first, second = task.split("train")
    assert (first.id, first.prompt, second.id, second.prompt) == ("7", "2+2=", "b", CHAT)
    assert first.columns == {"answer": "4", "id": 7, "level": None}, "every reward call gets the same columns"
    assert second.columns == {"answer": "4", "id": "b", "level": 2}
    assert (task.name, task.columns) == ("train", ["answer", "id", "level"])
    assert task.split("id") == task.split("ood") == task.split("no such split") == ()
    assert task.environment(first).reset() == "2+2="


def test_jsonl_with_byte_order_mark_blank_lines_windows_ends_and_unicode_line_separators(write: Write) -> None:
    content = '\ufeff{"prompt": "première"}\r\n\r\n  \n{"prompt": "two\u2028lines"}'.encode()
    prompts = [e.prompt for e in FilesTask(write(content), held_out=0).split("train")]
    assert prompts == ["première", "two\u2028lines"]


def test_parquet_and_datasets_folders_give_the_same_examples_as_jsonl(write: Write, tmp_path: Path) -> None:
    # Columns of a table have one type: a message without `name` comes back with None there, which is dropped.
    named = [{"role": "user", "content": "3+3?", "name": "Ada"}]
    rows = [{"prompt": CHAT, "answer": "4"}, {"prompt": named, "answer": None}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "train.parquet")
    data.save_to_disk(tmp_path / "saved")
    paths = write(rows), tmp_path / "train.parquet", tmp_path / "saved"
    jsonl, parquet, saved = (FilesTask(path, held_out=0).split("train") for path in paths)
    assert jsonl == parquet == saved
    assert jsonl[1].prompt == named


def test_a_named_prompt_column_is_found(write: Write) -> None:
    task = FilesTask(write([{"question": "2+2?", "answer": "4"}]), prompt_column="question", held_out=0)
    assert task.split("train")[0].columns == {"answer": "4"}


# Ids and splits.


def test_ids_follow_the_prompt_and_not_the_row_and_repetitions_are_counted(write: Write) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "answer": 1}, {"prompt": CHAT}]
    ids = [e.id for e in FilesTask(write(rows), held_out=0).split("train")]
    assert len(set(ids)) == 4
    assert ids[2] == f"{ids[0]}-2"
    moved = [e.id for e in FilesTask(write([{"prompt": "new"}, *reversed(rows)]), held_out=0).split("train")]
    assert moved[1:] == [ids[3], ids[0], ids[1], ids[2]], "the repetition is the later one, all else has moved along"


def test_held_out_prompts_are_a_stable_share_and_never_trained_on(write: Write) -> None:
    rows = many(2000)
    task = FilesTask(write(rows + rows), held_out=0.1)
    train, held = ({str(e.prompt) for e in task.split(name)} for name in ("train", "id"))
    assert not train & held
    assert len(train) + len(held) == 2000
    assert len(task.split("train")) + len(task.split("id")) == 4000
    assert abs(len(held) - 200) <= 5 * (2000 * 0.1 * 0.9) ** 0.5
    fewer = FilesTask(write(rows[500:]), held_out=0.1)
    assert {str(e.prompt) for e in fewer.split("id")} == held - {str(r["prompt"]) for r in rows[:500]}


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.999999])
def test_neither_side_of_the_split_is_ever_empty(write: Write, share: float) -> None:
    task = FilesTask(write(many(2)), held_out=share)
    assert len(task.split("train")) == len(task.split("id")) == 1


def test_given_evaluation_files_are_the_splits_and_nothing_is_held_out(write: Write) -> None:
    path, ids, ood = write(many(30)), write(many(2, level=1), "id.jsonl"), write([{"prompt": "x"}], "ood.jsonl")
    with pytest.warns(UserWarning, match="have no column 'level'") as warned:
        task = FilesTask(path, id_path=ids, ood_path=ood, held_out=0.5)
    assert [said.split(":")[0] for said in (str(one.message) for one in warned) if "no column" in said] == [
        f"task.path = {path}",
        f"task.ood_path = {ood}",
    ]
    assert [len(task.split(name)) for name in ("train", "id", "ood")] == [30, 2, 1]
    assert task.split("train")[0].columns == {"level": None}, "the columns of one split are those of all"


def test_held_out_prompts_of_a_form_that_training_never_has_are_refused(write: Write) -> None:
    strings, lists = write(many(3)), write([{"prompt": CHAT}], "lists.jsonl")
    mixed = write([*many(1), {"prompt": [{"role": "user", "content": "3+3?"}]}], "mixed.jsonl")
    for train, held, said in (
        (strings, lists, "message list"),
        (strings, mixed, "message list"),
        (lists, strings, "str"),
    ):
        with pytest.raises(
            InputError, match=rf"^task.id_path = {re.escape(str(held))}: the prompt .* is a {said}"
        ) as no:
            FilesTask(train, id_path=held)
        assert "\n" not in str(no.value)
    assert FilesTask(mixed, id_path=lists, ood_path=strings).split("id")
    assert FilesTask(strings, ood_path=lists).split("ood")  # of another kind: its reward may know it


def test_held_out_prompts_that_are_trained_on_are_counted_in_a_warning(write: Write) -> None:
    train, ids = write(many(10)), write([*many(12)[7:], {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], "id.jsonl")
    said = rf"^task.id_path = {re.escape(str(ids))}: 3 of 8 held-out prompts \(37.5%\) stand word for word in task.path"
    with pytest.warns(UserWarning, match=said) as caught:  # numbers 7, 8 and 9 of 7 to 11, and three others
        FilesTask(train, id_path=ids, ood_path=write([{"prompt": "x"}], "ood.jsonl"))
    assert len(caught) == 1  # none of `ood`
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FilesTask(train, held_out=0.5)


def test_held_out_rows_have_an_order_of_their_own_and_training_rows_that_of_the_file(write: Write) -> None:
    rows = many(20, topic="sums") + [{"prompt": f"Name {i}", "topic": "names"} for i in range(20)]  # sorted by topic

    def order(given: list[Any], split: str, **settings: Any) -> list[str]:
        return [str(e.prompt) for e in FilesTask(write(given), **settings).split(split)]

    path, turned, other = write(rows, "id.jsonl"), write(rows[::-1], "turned.jsonl"), [{"prompt": "another"}]
    first = order(other, "id", id_path=path)
    assert 3 <= sum(prompt.startswith("Name") for prompt in first[:16]) <= 13  # 8 on average, 0 in the file's order
    assert order(other, "id", id_path=turned) == order(other, "ood", ood_path=path, held_out=0) == first
    assert order(other, "id", id_path=write(rows[5:], "fewer.jsonl")) == [
        p for p in first if p not in [r["prompt"] for r in rows[:5]]
    ]
    assert order(rows, "id", held_out=0.5) == order(rows[::-1], "id", held_out=0.5)
    assert order(rows, "train", held_out=0) == [row["prompt"] for row in rows]


# The truth.


def test_the_truth_is_unknown_unless_a_function_is_given_and_that_is_guarded(write: Write) -> None:
    path = write([{"prompt": "2+2=", "answer": "4"}])
    arguments = (["2+2=", "2+2=", "2+2="], ["4", "5", "?"], [[1], [2], [3]])
    assert FilesTask(path, held_out=0).true_reward(*arguments, answer=["4"] * 3) == [None, None, None]

    def truth(prompts: Any, completions: Any, completion_ids: Any, answer: Any) -> list[float]:
        return [float(int(c) == int(a)) for c, a in zip(completions, answer, strict=True)]

    task = FilesTask(path, held_out=0, truth=truth)
    with pytest.warns(UserWarning, match=r"task.truth failed for 1 of 3 responses.*ValueError.*Said once"):
        assert task.true_reward(*arguments, answer=["4"] * 3) == [1.0, 0.0, None]
    assert task.true_reward(*arguments, answer=["4"] * 3) == [1.0, 0.0, None]  # and says nothing
    with pytest.raises(InputError, match=r"^task.truth: 'no_such:truth' could not be imported"):
        FilesTask(path, held_out=0, truth="no_such:truth")


# Everything that can be wrong: field, file, line, value, remedy.

BAD_ROWS = [
    (b"", r"is empty; give it at least one row$"),
    (b"\n \n", r"is empty"),
    (
        b'{"prompt": "a"}\n{"prompt": "b"\n',
        r", line 2 is no JSON \(.*column 15\): it says '\{\"prompt\": \"b\"'; write one JSON object a line$",
    ),
    (b'[{"prompt": "a"}]', r", line 1 is \[\{'prompt': 'a'\}\]; write one JSON object a line$"),
    (b'{"prompt": "a"}\nnull\n', r", line 2 is None; write one JSON object a line$"),
    (b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n', r", line 3 is not UTF-8 \(byte 16\); save the file as UTF-8$"),
    ([{"prompts": "a", "x": 1}], r", line 1 has no column 'prompt' .*'prompts', 'x'.*did you mean 'prompts'\?"),
    ([{"text": "a"}], r", line 1 has no column 'prompt' .*\('text'\); set task.prompt_column$"),
    ([{"prompt": "a"}, {}], r", line 2 has no column 'prompt' .*none at all"),
    ([{"prompt": "a"}, {"prompt": " \n"}], r", line 2 has an empty 'prompt'; give it a text or remove the row$"),
    ([{"prompt": 3}], r", line 1 has 3 as 'prompt'; give a string, or a list of messages"),
    ([{"prompt": None}], r", line 1 has None as 'prompt'"),
    ([{"prompt": {"role": "user", "content": "a"}}], r", line 1 has \{'role': .* as 'prompt'"),
    ([{"prompt": []}], r", line 1 has a 'prompt' without any text"),
    ([{"prompt": [{"role": "user", "content": ""}]}], r", line 1 has a 'prompt' without any text"),
    ([{"prompt": [*CHAT, "and?"]}], r", line 1, prompt\[2\] is 'and\?'; give a message with role and content$"),
    ([{"prompt": [{"content": "a"}]}], r", line 1, prompt\[0\] has nothing as 'role'; give every message a text"),
    ([{"prompt": [{"role": "user"}]}], r", line 1, prompt\[0\] has nothing as 'content'"),
    ([{"prompt": [{"role": "user", "content": [1]}]}], r", line 1, prompt\[0\] has \[1\] as 'content'"),
    ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], r", line 2 has the id '1' of .*line 1; make the ids"),
    ([{"prompt": "a", "id": 1}, {"prompt": "b"}], r", line 2 has the id None; give every row a string or an int"),
    ([{"prompt": "a"}, {"prompt": "b", "id": 1}], r", line 2 has the id 1, but the first row has none; give"),
    ([{"prompt": "a", "completions": 1}], r", line 1 has a column 'completions', .*; rename it$"),
    ([{"prompt": "a", "self": 1}], r", line 1 has a column 'self', .*; rename it$"),
    ([{"prompt": "a"}], r"holds a single prompt, .* task.id_path or set task.held_out=0$"),
]


@pytest.mark.parametrize(("content", "message"), BAD_ROWS, ids=[m[:60] for _, m in BAD_ROWS])
def test_a_bad_row_is_one_sentence_with_file_line_value_and_remedy(write: Write, content: Any, message: str) -> None:
    path = write(content)
    with pytest.raises(InputError, match=r"^task.path: .*train.jsonl.*" + message) as caught:
        FilesTask(path)
    assert "\n" not in str(caught.value)


def test_a_path_that_leads_nowhere_or_to_something_else(write: Write, tmp_path: Path) -> None:
    good = write(many(2))
    with pytest.raises(InputError, match=r"^task.path: there is no file .*trian.jsonl'; did you mean 'train.jsonl'\?$"):
        FilesTask(tmp_path / "trian.jsonl")
    write(b"", "d.json")  # of which no `nope.jsonl` is a misspelling
    write(b"", "notes.yaml")
    for name in ("nope.jsonl", "note.jsonl"):
        with pytest.raises(InputError, match=rf"^task.path: there is no file .*{name}'; check the path"):
            FilesTask(tmp_path / name)
    with pytest.raises(InputError, match=r"^task.ood_path: there is no file .*zzz'; check the path"):
        FilesTask(good, ood_path=tmp_path / "zzz")
    with pytest.raises(InputError, match=r"^task.id_path: cannot tell the format of .*data.csv' by its ending; give"):
        FilesTask(good, id_path=write(b"prompt\n", "data.csv"))
    with pytest.raises(InputError, match=r"^task.path: .*data.parquet' is no readable parquet file"):
        FilesTask(write(b"nonsense", "data.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"^task.path: the folder .*folder' holds no data set .*save_to_disk"):
        FilesTask(tmp_path / "folder")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(many(2))}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"holds the splits train; give one of them, '.*saved/train' for example$"):
        FilesTask(tmp_path / "saved")
    assert FilesTask(tmp_path / "saved" / "train").split("train")


def test_a_file_without_the_right_to_read_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(many(2))

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root, whom containers run as, may read everything
    with pytest.raises(InputError, match=r"^task.path: .*train.jsonl' cannot be read \(Permission denied\)"):
        FilesTask(path)


def test_bad_rows_of_tables_are_named_by_their_row(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"prompt": ["a", ""]})
    data.to_parquet(tmp_path / "table.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("table.parquet", "saved"):
        with pytest.raises(InputError, match=rf"{name}, row 2 has an empty 'prompt'"):
            FilesTask(tmp_path / name)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_held_out_share_out_of_range(write: Write, share: float) -> None:
    with pytest.raises(InputError, match=rf"^task.held_out: {re.escape(repr(share))} is no share"):
        FilesTask(write(many(2)), held_out=share)


def test_without_the_data_extra_tables_name_the_command_and_jsonl_still_works(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_extras(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", without_extras)
    (tmp_path / "saved").mkdir()
    for path in (tmp_path / "saved", write(b"", "table.parquet")):
        with pytest.raises(InputError, match=r"needs a further package; run `pip install dvpo\[data\]`$"):
            FilesTask(path)
    assert FilesTask(write(many(2))).split("train")
