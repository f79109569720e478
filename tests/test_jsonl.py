"""Lines of JSON from outside: what is refused, by its line, and what only looks wrong."""

import json
from pathlib import Path

import pytest

from dvpo.errors import InputError
from dvpo.jsonl import json_objects
from dvpo.noise import read_labels
from dvpo.preferences import read_pairs
from dvpo.tasks.files import FilesTask


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\xff", r"line 2 is not UTF-8 \(byte 1\)"),
        (b'{"a": ', r"line 2 is no JSON \(Expecting value, column 7\): it says '{\"a\": '; write one"),
        (b"x" * 70, r"line 2 is no JSON \(Expecting value, column 1\): it begins with 'x{60}'; write one"),
        (b"[1]", r"line 2 is \[1\]; write one JSON object a line"),
        (b'{"a": 1, "a": 2}', "line 2 has the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 2}}', "line 2 has the key 'b' twice"),
        (b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2 has an integer of thousands of digits"),
        (rb'{"a": "\ud800"}', "line 2 has half a surrogate pair"),
        (rb'{"\udfff": 1}', "line 2 has half a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: bytes, words: str):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 0}\n' + line + b"\n")
    with pytest.raises(InputError, match="^some.field: .*lines.jsonl, " + words) as refused:
        list(json_objects(file, "some.field"))
    assert len(str(refused.value)) < 300


def test_marks_blank_lines_and_separators_within_a_text_are_no_fault(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    rows = [{"a": "one\u2028line\x85still"}, {"a": "\U0001f600"}]
    text = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n\n")
    assert list(json_objects(file)) == [(f"{file}, line 1", rows[0]), (f"{file}, line 3", rows[1])]


def test_every_reader_of_lines_takes_a_text_with_a_separator_and_refuses_a_key_twice(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    row = {"id": "a", "answer": "1", "prompt": "one\u2028two", "chosen": "x", "rejected": "y"}
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read_labels(file) == {"a": "1"}
    assert read_pairs(file)[0].prompt == "one\u2028two"
    assert FilesTask(file, held_out=0).split("train")[0].prompt == "one\u2028two"
    file.write_text('{"id": "a", "answer": 1, "answer": 2, "prompt": "p", "chosen": "x", "rejected": "y"}')
    for read in (read_labels, read_pairs, FilesTask):
        with pytest.raises(InputError, match="has the key 'answer' twice"):
            read(file)
