"""Files that survive a kill, a power cut and a full disk: written aside, flushed, renamed into place."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dvpo.errors import InputError


class DiskFullError(InputError):
    """No room for a file. The user can mend it, and whoever catches it may go on without the file."""


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn every library's way of saying that the disk under `path` is full into one clear sentence.

    Raises:
        DiskFullError: if the block ran out of space or quota.
    """
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk is full: {path} could not be written; free some space or choose another output folder"
        ) from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors wraps the system's error in its own type and keeps only the text.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def output_file(name: str | Path, option: str = "") -> Path:
    """The file that a command writes at its end, looked at before its work begins; a link's is what it leads to.

    Raises:
        InputError: there is no such folder, it cannot be written to, or what has the name is a folder or a pipe.
    """
    file = Path(name)
    said = f"{option} = {file}" if option else str(file)
    if file.is_symlink():
        file = file.resolve()
    if not file.parent.is_dir():
        raise InputError(f"{said}: there is no folder {file.parent}; make it, or name another file")
    if file.exists() and not file.is_file():
        raise InputError(f"{said} is {'a folder' if file.is_dir() else 'no file that can be replaced'}: name a file")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{said}: the folder {file.parent} cannot be written to; name a file elsewhere")
    return file


def flush_file(path: Path) -> None:
    """Return only when the file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A folder is flushed the same way; what becomes durable is the list of its names, e.g. after a rename.
flush_folder = flush_file


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` by the concatenated `chunks`; whoever reads it sees the old file or the new one, whole.

    Raises:
        DiskFullError: if there is no room; the old file stands.
    """
    aside = path.with_name(f".tmp-{path.name}")
    with disk_full_named(path):
        try:
            with open(aside, "wb") as file:
                file.writelines(chunks)
            flush_file(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)
