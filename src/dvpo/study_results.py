"""The results of a study: one JSONL file, one row a finished run, whole after any kill.

A row is read from the run's own folder, so it is the same whether the run was killed on the way or not. Fields:

    task, noise, algorithm, seed    the cell
    id_before, ood_before           true greedy accuracy on the held-out splits before training, in [0, 1]; of a mix
                                    the mean over its tasks
    id_true, ood_true               the same after the last step
    peak_true                       the highest ID accuracy of the curve
    curve                           [[step, id, ood], ...], one entry an evaluation
    corr                            mean of critic/true_correlation over the last 20% of the steps
    seconds                         of sampling, scoring and updating (no start-up, evaluation or checkpoint)
    machine, commit                 where it ran; several, joined by " + ", if it was killed and resumed elsewhere;
                                    `-dirty` marks a commit whose source had been changed
    config_hash                     of all settings that have a say in the result
    unknown                         only where there are any: held-out items that had no reward at the end, and count in
                                    no accuracy

What does not exist (a split, a truth, a critic) is null.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from dvpo.durable import disk_full_named, flush_folder
from dvpo.errors import InputError
from dvpo.runlog import TIME_PREFIX, is_evaluation, read_rows
from dvpo.study import Cell, CellKey, Study, cell_id

Row = dict[str, Any]

FIELDS = (
    *("task", "noise", "algorithm", "seed", "id_before", "ood_before", "id_true", "ood_true", "peak_true"),
    *("curve", "corr", "seconds", "machine", "config_hash", "commit"),
)


def result_row(cell: Cell) -> Row:
    """The row of a finished run, from its folder.

    Raises:
        InputError: the run has not come to its end, or its log is damaged.
    """
    steps: dict[int, Row] = {}
    evaluations: dict[int, Row] = {}
    for row in read_rows(cell.folder / "metrics.jsonl"):
        kind = evaluations if is_evaluation(row) else steps
        kind[row["step"]] = row
    curve = [[step, split_accuracy(row, "id"), split_accuracy(row, "ood")] for step, row in sorted(evaluations.items())]
    if not curve or curve[0][0] != 0 or curve[-1][0] != cell.config.steps:
        raise InputError(f"{cell.folder} lacks an evaluation at its start or end: remove it and run the cell again")
    machine, commit = _machine_and_commit(cell.folder)
    return {
        "task": cell.task,
        "noise": cell.noise,
        "algorithm": cell.algorithm,
        "seed": cell.seed,
        "id_before": curve[0][1],
        "ood_before": curve[0][2],
        "id_true": curve[-1][1],
        "ood_true": curve[-1][2],
        "peak_true": max((at_id for _, at_id, _ in curve if at_id is not None), default=None),
        "curve": curve,
        "corr": late_mean(steps, "critic/true_correlation", cell.config.steps),
        "seconds": round(sum(row.get(f"{TIME_PREFIX}step", 0.0) for row in steps.values()), 1),
        "machine": machine,
        "config_hash": cell.config_hash,
        "commit": commit,
        **({"unknown": unknown} if (unknown := _unknown(evaluations[max(evaluations)])) else {}),
    }


def split_accuracy(evaluation: Row, split: str) -> float | None:
    """Of the split of that name, or the mean over those of a mix's tasks."""
    ending = f"/{split}/accuracy"
    known = [value for name, value in evaluation.items() if name.endswith(ending) and value is not None]
    return math.fsum(known) / len(known) if known else None


def _unknown(evaluation: Row) -> int:
    return int(sum(value or 0 for name, value in evaluation.items() if name.endswith("/unknown")))


def late_mean(steps: Mapping[int, Row], name: str, last: int) -> float | None:
    """Of a metric over the last fifth of the steps; None where it is not known."""
    known = [row.get(name) for step, row in steps.items() if 5 * step > 4 * last]
    values = [value for value in known if value is not None]
    return sum(values) / len(values) if values else None


def _machine_and_commit(folder: Path) -> tuple[str, str | None]:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    sessions = [manifest, *manifest["resumes"]]
    machines = [session["machine"]["gpu"] or session["machine"]["cpu"] for session in sessions]
    commits = [f"{s['commit']}{'-dirty' if s['dirty'] else ''}" for s in sessions if s["commit"]]
    return " + ".join(dict.fromkeys(machines)), " + ".join(dict.fromkeys(commits)) or None


class ResultsFile:
    """The results file while a study writes it: locked, mended, and every row on the disk once `append` returns.

    Raises:
        InputError: another study is writing it, or a line in its middle is damaged.
        DiskFullError: here and in `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_full_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(path, "a+")
        flush_folder(path.parent)
        try:
            _lock(self._file, wait=False)
            self._mend()
            self.rows = read_results(path)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        """Write one row; either all of it stands in the file or nothing."""
        end = self._file.seek(0, os.SEEK_END)
        left = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        with disk_full_named(self.path):
            try:
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _mend(self) -> None:
        """Drop the half line of a kill; a last line that only lacks its end gets it."""
        text = self.path.read_bytes()
        whole, last = text[: text.rfind(b"\n") + 1], text[text.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            self._file.truncate(len(whole))
        else:
            self._file.write(b"\n")


def read_results(path: Path) -> list[Row]:
    """The rows of a results file, a half-written last one left out; none if there is no file.

    Raises:
        InputError: if a line is damaged or lacks a field, or two rows are of one cell.
    """
    rows: dict[CellKey, Row] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            missing = [name for name in FIELDS if name not in row]
        except (ValueError, TypeError):
            if not line.endswith(b"\n"):
                break
            raise InputError(f"{path} is damaged at line {number}: remove that line") from None
        if missing:
            raise InputError(f"{path}, line {number} has no {missing[0]}: it is no row of a study; remove that line")
        if row_key(row) in rows:
            raise InputError(
                f"{path}, line {number} is a second row of {cell_id(row_key(row))}: remove one of the two lines"
            )
        rows[row_key(row)] = row
    return list(rows.values())


def last_quarter(row: Row) -> Row:
    """The row with the mean over its last quarter's evaluations in place of the accuracy after the last step.

    An evaluation counts if at most a quarter of the steps came after it; the one before training never does. A mean of
    several scatters less than the last one of them.
    """
    steps = row["curve"][-1][0]
    late = [point for point in row["curve"] if point[0] > 0 and 4 * point[0] >= 3 * steps]
    ends = {}
    for column, split in enumerate(("id", "ood"), start=1):
        known = [point[column] for point in late if point[column] is not None]
        ends[f"{split}_true"] = math.fsum(known) / len(known) if known else None
    return {**row, **ends}


def row_key(row: Row) -> CellKey:
    return row["task"], row["noise"], row["algorithm"], row["seed"]


def finished_cells(study: Study, rows: list[Row], path: Path) -> set[CellKey]:
    """The cells that have a row.

    Raises:
        InputError: a row was made with other settings than the study has now.
    """
    found = {row_key(row): row["config_hash"] for row in rows}
    for cell in study.cells:
        if found.get(cell.key, cell.config_hash) != cell.config_hash:
            raise InputError(
                f"{path} holds a row of {cell.id} whose settings (config_hash {found[cell.key]}) are not those of the "
                f"study now ({cell.config_hash}): take the old settings or the row's commit, give the study another "
                "output, or move that row and the cell's run folder away"
            )
    return set(found)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that no other process holds, waiting for it if need be; it ends with the process."""
    with FileIO(path, "a") as file:
        _lock(file, wait=True)
        yield


def _lock(file: FileIO, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise InputError(f"{file.name!s} is being written by another dvpo study: wait for it, or end it") from None
