"""Running a study: every cell is a `Trainer` run in a process of its own, and the parent alone writes the results.

A run that is killed, or whose parent is, goes on from its checkpoint when the study is started again; one that fails
leaves a file `error` in its folder, is named on the screen, and is tried again at the next start.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from dvpo.config import Config
from dvpo.durable import write_atomically
from dvpo.errors import InputError, warning_text
from dvpo.interrupt import RESUMABLE, Interrupted, handled
from dvpo.loading import load_config
from dvpo.plain_text import duration
from dvpo.runlog import read_rows
from dvpo.settings import TaskConfig
from dvpo.study import Cell, Study, result_hash
from dvpo.study_results import ResultsFile, Row, finished_cells, locked, result_row
from dvpo.tasks.mixture import held_out
from dvpo.tasks.named import make_task

ERROR, SAID, LOCK = "error", "output.txt", ".lock"
"""In a run's folder: why it failed; what it said; held by the process that runs it."""


def run_study(study: Study, processes: int | None, results: Path, console: Console) -> list[Cell]:
    """Run the cells that have no row yet.

    Args:
        study: what to run.
        processes: so many cells at a time, each on one thread; None: as many as cores, one where cells take a GPU.
        results: file that a row is appended to whenever a run has finished.
        console: takes a line for each finished or failed run.

    Returns:
        The cells that failed.

    Raises:
        InputError: before anything runs: tasks that cannot be made, or rows and runs of other settings.
    """
    if processes is not None and processes < 1:
        raise InputError(f"--processes = {processes} must be at least 1")
    with ResultsFile(results) as file:
        done = finished_cells(study, file.rows, results)
        left = [cell for cell in study.cells if cell.key not in done]
        _refuse_other_runs(left)
        _refuse_unmakeable_tasks(left)
        if processes is None:  # two runs would share a GPU's memory
            on_gpu = torch.cuda.is_available() and any(cell.config.device != "cpu" for cell in left)
            processes = 1 if on_gpu else os.cpu_count() or 1
        total, failed = len(study.cells), []
        console.print(f"{total} cells, {total - len(left)} of them done: {results}", soft_wrap=True)
        progress = _Progress(console, total, len(left))
        for cell, code in _trained(left, processes):
            outcome = _outcome(cell, code)
            if isinstance(outcome, str):
                failed.append(cell)
                progress.failed(cell, outcome)
            else:
                file.append(outcome)
                progress.finished(cell, outcome)
    return failed


def _refuse_other_runs(cells: list[Cell]) -> None:
    """An unfinished run of other settings cannot go on; say so before the others take hours."""
    for cell in cells:
        begun = cell.folder / "config.yaml"
        if begun.exists() and result_hash(load_config(begun)) != cell.config_hash:
            raise InputError(
                f"{cell.folder} holds a run of other settings than the study has now: take the old settings, give "
                "the study another output, or move that folder away"
            )


def _refuse_unmakeable_tasks(cells: list[Cell]) -> None:
    sections: list[TaskConfig] = []
    for cell in cells:
        if cell.config.task not in sections:
            sections.append(cell.config.task)
            if not held_out(make_task(cell.config.task)):
                raise InputError(
                    f"{cell.folder.name}: its task holds nothing out, and a row of a study is what evaluations say: "
                    "set task.held_out above 0, or name task.id_path"
                )


def _outcome(cell: Cell, code: int | None) -> Row | str:
    """The row of a run whose process ended with `code`, or why there is none, which `error` tells at length."""
    error = cell.folder / ERROR
    if code == 0:
        try:
            return result_row(cell)
        except InputError as fault:
            reason = str(fault)
    elif error.exists():
        return error.read_text().strip().splitlines()[-1]
    else:
        ended = f"was ended by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        reason = f"the run's process {ended}, perhaps for want of memory; see {cell.folder / SAID}"
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(error, [f"{reason}\n".encode()])
    return reason


# Processes


def _trained(cells: list[Cell], processes: int) -> Iterator[tuple[Cell, int | None]]:
    """Train all cells; yields each as it ends, with its process's exit code."""
    context, waiting = _context(), deque(cells)
    running: dict[Any, tuple[BaseProcess, Cell]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                cell = waiting.popleft()
                (cell.folder / ERROR).unlink(missing_ok=True)
                process = context.Process(target=_train, args=(cell.config,), name=cell.id)
                process.start()
                running[process.sentinel] = (process, cell)
            for sentinel in wait(running):
                process, cell = running.pop(sentinel)
                process.join()
                yield cell, process.exitcode
    finally:  # only after an interruption or on a full disk is anything left here
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _context() -> Any:
    """Fresh processes, one thread each.

    Importing torch and transformers takes five seconds of processor time. Forked from a server that has done nothing
    but these imports, a run starts at once and is as clean as a spawned one. Where there is a GPU the imports may have
    touched it, and then a fork cannot use it.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for the children; this process works no more
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dvpo.trainer"])
    return context


def _train(config: Config) -> None:
    """In the cell's process: run to the end, from the checkpoint if there is one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.formatwarning = warning_text
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / SAID, "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    # A process whose parent was killed may still be about to die: two must never write one run.
    with locked(folder / LOCK), handled():
        try:
            from dvpo.trainer import Trainer
            from dvpo.warmstart import starting_model

            with locked(folder.parent / LOCK):  # one makes the embedded model, the others find it made
                starting_model(config)
            Trainer(config, resume=(folder / "config.yaml").exists()).train()
        except InputError as error:
            _fail(folder, str(error))
        except Interrupted as stop:
            raise SystemExit(RESUMABLE) from stop
        except Exception:
            _fail(folder, traceback.format_exc())


def _fail(folder: Path, reason: str) -> NoReturn:
    write_atomically(folder / ERROR, [reason.strip().encode() + b"\n"])
    raise SystemExit(1)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _count_faults(cell: Cell) -> int:
    """Rewards that a run lost, its evaluations' included."""
    file = cell.folder / "faults.jsonl"
    return sum(row.get("cured") is False for row in read_rows(file)) if file.exists() else 0


class _Progress:
    """A line for each run that ends: how many are done, what came out, how long the rest will take."""

    def __init__(self, console: Console, total: int, left: int) -> None:
        self.console, self.total, self.left = console, total, left
        self._began, self._ended = time.monotonic(), 0

    def finished(self, cell: Cell, row: Row) -> None:
        figures = [
            f"{split.upper()} {100 * row[f'{split}_before']:.1f} -> {100 * row[f'{split}_true']:.1f}"
            for split in ("id", "ood")
            if row[f"{split}_before"] is not None and row[f"{split}_true"] is not None
        ]
        if unknown := row.get("unknown"):
            figures.append(f"{unknown} held-out without a reward")
        if faults := _count_faults(cell):
            figures.append(f"{faults:,} rewards failed")
        self._line(cell, "  ".join([*figures, f"{row['seconds']:.0f} s"]))

    def failed(self, cell: Cell, reason: str) -> None:
        self._line(cell, f"FAILED: {reason} ({cell.folder / ERROR})")

    def _line(self, cell: Cell, text: str) -> None:
        self._ended += 1
        more = self.left - self._ended
        seconds = (time.monotonic() - self._began) / self._ended * more
        left = f"  about {duration(seconds)} left" if more else ""
        self.console.print(f"{self.total - more}/{self.total}  {cell.id}  {text}{left}", soft_wrap=True, markup=False)
