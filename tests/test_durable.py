"""Files written aside and renamed: old or new, never half; a full disk is said in one sentence."""

import errno
import os
from pathlib import Path

import pytest

from dvpo.durable import DiskFullError, disk_full_named, output_file, write_atomically
from dvpo.errors import InputError


def test_a_failure_amid_the_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_atomically(path, [b"old"])

    def chunks():
        yield b"new"
        raise RuntimeError("amid")

    with pytest.raises(RuntimeError, match="amid"):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_the_new_contents_are_on_the_disk_before_they_take_the_name(tmp_path: Path, monkeypatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "file", [b"a", b"b"])
    assert events == ["flush", "rename", "flush"]  # the contents; the name; the folder's list of names
    assert (tmp_path / "file").read_bytes() == b"ab"


def test_what_cannot_be_written_at_the_end_is_refused_at_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("none/x", "there is no folder"),
        ("folder", "is a folder"),
        ("pipe", "is no file that can be"),
    ):
        with pytest.raises(InputError, match=f"--output = {tmp_path / name}.*{words}"):
            output_file(tmp_path / name, "--output")


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(output_file(tmp_path / "link"), [b"new"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_way_to_say_that_the_disk_is_full_becomes_one_sentence(error: Exception) -> None:
    sentence = r"^the disk is full: run could not be written; free some space"
    with pytest.raises(DiskFullError, match=sentence) as caught, disk_full_named(Path("run")):
        raise error
    assert isinstance(caught.value, InputError)
    assert caught.value.__cause__ is error


def test_other_errors_are_not_called_a_full_disk() -> None:
    with pytest.raises(FileNotFoundError), disk_full_named(Path("run")):
        raise FileNotFoundError(errno.ENOENT, "No such file")
