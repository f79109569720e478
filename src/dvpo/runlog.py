"""What a run leaves behind: metrics, completions and faults line by line, and where they come from.

    config.yaml        the config, as it was validated
    config-N.yaml      only if a resume at step N changed it: what it was before
    manifest.json      versions, machine, seed, commit, command line, an id, what was given in Python instead of the
                       config's; one entry in `resumes` for each resume
    dirty.diff         only for a source tree with uncommitted changes: what they are
    metrics.jsonl      one object a step, and one an evaluation (keys `eval/...`)
    completions.jsonl  sampled texts with their rewards
    tokens.jsonl       some of them token by token, with what the critic thought (`token_view.py`)
    faults.jsonl       reward calls that failed, and whatever else the run survived

Every line is handed to the system when it is written, so a kill costs at most half a line. A resume at step N
drops what came after N: the log of a killed and resumed run equals that of an uninterrupted one but for
wall-clock figures, whose keys begin with `time/`. Lines are strict JSON: floats in full precision, null for
NaN and infinity.
"""

import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from dvpo import provenance
from dvpo.distributed import is_main, world_size
from dvpo.durable import disk_full_named, write_atomically
from dvpo.errors import InputError
from dvpo.settings_learning import LogConfig
from dvpo.sinks import Identity, Sinks

TIME_PREFIX = "time/"
"""Metrics whose keys begin so are wall-clock figures; every other one is the same in two equal runs."""

STREAMS = ("metrics.jsonl", "completions.jsonl", "tokens.jsonl", "faults.jsonl")


class RunLog:
    """The log of one run. Every process may call it; only rank 0 writes.

    Args:
        folder: the run's folder.
        config: the config as YAML text.
        seed: the run's seed.
        device: where the models live.
        resume_step: the step of the checkpoint to resume from; -1 to begin again a run that was killed before its
            first checkpoint; None for a fresh run.
        log: which sinks take the metrics as well (`dvpo.sinks`).
        in_python: `task` and `reward`, where an object was given instead -> what the config names, which is not used.

    Raises:
        InputError: a fresh run in a folder that holds one, a resume in one that holds none, a damaged log, a sink that
            cannot be had.
        DiskFullError: here and in every method that writes.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        seed: int,
        device: str | torch.device,
        resume_step: int | None = None,
        log: LogConfig | None = None,
        in_python: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._streams: dict[str, FileIO] = {}
        if not is_main():
            return
        facts = {"seed": seed, "in_python": in_python or {}, "machine": provenance.machine(device)}
        run_id = secrets.token_hex(6) if resume_step is None else _resume(folder, config, facts, resume_step)
        if resume_step is None:
            _make_folder(folder)
        identity = Identity(folder, run_id, yaml.safe_load(config), resume_step)
        self._sinks = Sinks(LogConfig() if log is None else log, identity)
        if resume_step is None:  # last: a sink that refuses leaves no run behind
            _start(folder, config, facts, run_id)
        self._streams = {name: FileIO(folder / name, "a") for name in STREAMS}

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one row of `step`, of its training or of its evaluation; 0-d tensors count as numbers."""
        self._append("metrics.jsonl", step, [metrics])
        if self._streams:
            self.faults(step, self._sinks.log(step, _plain(metrics)))

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one row for each sampled text kept of `step`."""
        self._append("completions.jsonl", step, rows)

    def tokens(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one row for each response kept token by token."""
        self._append("tokens.jsonl", step, rows)

    def faults(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one row for each fault survived in `step`."""
        self._append("faults.jsonl", step, rows)

    def sync(self) -> None:
        """Return only when all rows are on the disk; called before a checkpoint, whose resume needs them."""
        for name, stream in self._streams.items():
            with disk_full_named(self.folder / name):
                os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        if self._streams:
            self._sinks.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        if not is_main():
            return
        stream = self._streams[name]
        left = memoryview(b"".join(json_line({"step": step, **row}) for row in rows))
        whole = stream.seek(0, os.SEEK_END)
        with disk_full_named(self.folder / name):
            try:
                while left:
                    left = left[stream.write(left) :]
            except OSError:
                stream.truncate(whole)
                raise


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, a half-written last line left out.

    Raises:
        InputError: if another line is damaged.
    """
    for _, row in _rows(path, None):
        yield row


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row of `metrics.jsonl` is an evaluation's and not a step's."""
    return any(key.startswith("eval/") for key in row)


def refuse_used_folder(folder: Path) -> None:
    """Check that a fresh run may write here.

    Raises:
        InputError: the folder holds a run, or cannot be made.
    """
    if any(folder.glob("checkpoint-*")) or any((folder / name).exists() for name in ("manifest.json", *STREAMS)):
        raise InputError(
            f"output = {folder} already holds a run: go on with it by --resume, or choose another output folder"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"output = {folder} cannot be made, since {nearest} is no folder one may write to: "
            "choose another output folder"
        )


def _make_folder(folder: Path) -> None:
    refuse_used_folder(folder)
    try:
        with disk_full_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output = {folder} cannot be made ({error.strerror}): choose another folder") from None


def _start(folder: Path, config: str, facts: Mapping[str, Any], run_id: str) -> None:
    session = _record_session(folder, config, facts, "dirty.diff")
    # The manifest comes last: with it, the folder holds a run.
    _write_json(folder / "manifest.json", {"run_id": run_id, **session, "resumes": []})


def _resume(folder: Path, config: str, facts: Mapping[str, Any], step: int) -> str:
    """Cut the log at the step and note the resume; the run's id."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        raise InputError(f"output = {folder} holds no run to resume: check the path, or start afresh") from None
    for name in STREAMS:
        path = folder / name
        if path.exists():
            write_atomically(path, (line for line, _ in _rows(path, step)))
    before = (folder / "config.yaml").read_bytes()
    if step >= 0 and before != config.encode():
        write_atomically(unused(folder, f"config-{step}", ".yaml"), [before])
    session = _record_session(folder, config, facts, unused(folder, f"dirty-{step}", ".diff").name)
    manifest["resumes"].append({"step": step, **session})
    run_id: str = manifest.setdefault("run_id", secrets.token_hex(6))
    _write_json(folder / "manifest.json", manifest)
    return run_id


def unused(folder: Path, stem: str, *endings: str) -> Path:
    """The stem with the first ending; with -2, -3, ... where the name with any of the endings is taken."""
    stems = (f"{stem}{f'-{number}' if number > 1 else ''}" for number in count(1))
    free = next(name for name in stems if not any((folder / f"{name}{ending}").exists() for ending in endings))
    return folder / f"{free}{endings[0]}"


def _record_session(folder: Path, config: str, facts: Mapping[str, Any], diff_name: str) -> dict[str, Any]:
    """Write config and uncommitted changes; return the rest, for the manifest."""
    commit, dirty, diff = provenance.source()
    if diff:
        write_atomically(folder / diff_name, [diff.encode()])
    write_atomically(folder / "config.yaml", [config.encode()])
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        **facts,
        "config_hash": provenance.config_hash(config),
        "commit": commit,
        "dirty": dirty,
        "diff": diff_name if diff else None,
        "versions": provenance.versions(),
        "processes": world_size(),
    }


def _rows(path: Path, up_to_step: int | None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                step = row["step"]
            except (ValueError, TypeError, KeyError):
                if not line.endswith(b"\n"):
                    return  # the run was killed amid this line
                raise InputError(f"{path} is damaged at line {number}: remove that line") from None
            if up_to_step is None or step <= up_to_step:
                yield line.rstrip(b"\n") + b"\n", row


def json_line(row: Mapping[str, Any]) -> bytes:
    """Strict JSON whatever the row holds: `null` for NaN and infinity, the text of what JSON does not know."""
    return json.dumps(_plain(row), allow_nan=False, default=str).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists and numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, [json.dumps(value, indent=2).encode() + b"\n"])
