"""`dvpo watch`: the curves of runs in the terminal, redrawn while they go on. It reads metrics.jsonl and nothing more.

Lines of training steps are means over the steps that share a column; evaluations bear a mark and their interval.
"""

import difflib
import json
import os
import posixpath
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dvpo.charts import Chart, Line, Point
from dvpo.errors import InputError
from dvpo.interrupt import Interrupted
from dvpo.plain_text import duration, visible
from dvpo.runlog import is_evaluation
from dvpo.terminal_charts import COLOURS, FRAME, MARK, draw

NARROWEST, GAP = 36, 3
"""Columns of a chart, and between two."""
LOWEST, USUAL = 5, 8
"""Rows of a canvas: the least, and where the height of the screen does not matter."""


@dataclass(frozen=True)
class Panel:
    """One chart: keys of metrics.jsonl (docs/metrics.md) or patterns of them; all but the first are dotted."""

    title: str
    keys: tuple[str, ...]
    percent: bool = False
    floor: float = float("-inf")
    """Values below are drawn here: one wild step must not flatten the rest."""


PANELS = (
    Panel("Held-out accuracy", ("eval/*/accuracy",), percent=True),
    Panel("Reward", ("reward/true", "reward/observed")),
    Panel("Critic: explained variance", ("critic/explained_variance",), floor=-1.0),
    Panel("Critic: correlation with truth", ("critic/true_correlation",)),
    Panel("Critic loss", ("critic/loss",)),
    Panel("Policy loss", ("actor/loss",)),
    Panel("Entropy", ("actor/entropy",)),
    Panel("KL of a step", ("actor/kl",)),
    Panel("Seconds a step", ("time/step",)),
)


@dataclass
class Follower:
    """The rows of a run so far; each call of `read` takes in what was written since."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    _inode: int = -1
    _read: int = 0
    """Bytes taken in; always at the end of a line."""

    def read(self) -> None:
        """Take in new whole lines. A resume writes the file anew: then all of it is read again.

        Raises:
            InputError: a damaged line.
        """
        try:
            file = open(self.folder / "metrics.jsonl", "rb")  # noqa: SIM115
        except FileNotFoundError:
            self._begin(-1)
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:
                self._begin(status.st_ino)
            file.seek(self._read)
            # Whatever follows the last line's end is half a row: the run is writing it, or was killed amid it.
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            self.rows.append(self._parsed(line))
            self._read += len(line) + 1

    def _begin(self, inode: int) -> None:
        self.rows, self._inode, self._read = [], inode, 0

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
            float(row["step"])
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{self.folder / 'metrics.jsonl'} is damaged at line {len(self.rows) + 1}: remove that line"
            ) from None
        return row

    def keys(self) -> set[str]:
        return {key for row in self.rows for key in row} - {"step"}

    def curve(self, key: str, floor: float = float("-inf")) -> list[Point]:
        """(step, value), steps at which the figure is not defined left out."""
        values = ((row["step"], row.get(key)) for row in self.rows)
        return [(float(step), max(float(v), floor)) for step, v in values if isinstance(v, int | float)]

    @property
    def evaluated(self) -> list[float]:
        return [float(row["step"]) for row in self.rows if is_evaluation(row)]


def watch(sources: Sequence[str], metrics: Sequence[str], once: bool, every: float, console: Console) -> None:
    """Draw the curves of runs, again and again until Ctrl-C, or once.

    Args:
        sources: run folders or folders of runs, begun or not.
        metrics: what to draw instead of the usual: a key, several joined by commas for one chart, or patterns such as
            `critic/*`, a chart for each key.
        once: draw once; so does a console that is no terminal.
        every: seconds from one picture to the next.
        console: where to draw.

    Raises:
        InputError: no folder, no such figure, a damaged log; with `once` no run.
    """
    if every <= 0:
        raise InputError(f"--every = {every:g} is no time to wait: give seconds above 0")
    paths = map(Path, sources)
    wrong = next((path for path in paths if path.is_file() or path.suffix in (".yaml", ".yml")), None)
    if wrong is not None:
        raise InputError(f"{wrong} is no folder: give run folders, or folders of runs")
    followers: dict[Path, Follower] = {}
    if once or not console.is_terminal:
        console.print(picture(follow(sources, followers, waiting=False), metrics, console.width, None))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                runs = follow(sources, followers, waiting=True)
                live.update(picture(runs, metrics, console.width, console.height, waiting=True), refresh=True)
                time.sleep(every)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Interrupted) and stop.number != signal.SIGINT:
                raise
    # The screen is gone, the last picture stays.
    console.print(picture(runs, metrics, console.width, None, waiting=True))


def follow(sources: Sequence[str], followers: dict[Path, Follower], waiting: bool) -> list[Follower]:
    """Read what is new in the named runs, and in those that have begun in a named folder of runs.

    Raises:
        InputError: unless `waiting`, if a source holds no run.
    """
    folders: dict[Path, None] = {}
    for source in map(Path, sources):
        inside = [source] if (source / "metrics.jsonl").exists() else []
        inside = inside or sorted(path.parent for path in source.glob("*/metrics.jsonl"))
        if not inside and not waiting:
            raise InputError(f"{source} holds no run yet: give a run folder, or leave out --once to wait for it")
        folders |= dict.fromkeys(inside or [source])
    for folder in folders:
        followers.setdefault(folder, Follower(folder)).read()
    return [followers[folder] for folder in folders]


def picture(
    runs: Sequence[Follower], metrics: Sequence[str], width: int, height: int | None, waiting: bool = False
) -> RenderableType:
    """Everything that is shown at once.

    Args:
        runs: in the order of their colours.
        metrics: as in `watch`.
        width: of the screen in characters.
        height: of the screen; None: as many lines as it takes.
        waiting: a figure that is not there yet may come: its absence is said below the charts.

    Raises:
        InputError: unless `waiting`, if none of the runs logs a figure that is asked for.
    """
    begun = [run for run in runs if run.rows]
    head = _heads(runs)
    if not begun:
        return head
    absent = _absent(metrics, begun)
    if absent and not waiting:
        raise InputError(absent[0])
    charts = _charts(runs, _chosen(metrics, begun) if metrics else PANELS)
    if not charts:
        return Group(head, "", *map(Text, absent))
    columns = max(min((width + GAP) // (NARROWEST + GAP), len(charts)), 1)
    rows = -(-len(charts) // columns)
    lines = USUAL + FRAME
    if height is not None:
        free = height - len(runs) - 3 - len(absent)  # a line below the heads, and two of the foot
        rows = max(min(rows, free // (LOWEST + FRAME + 1)), 1)
        lines = max(free // rows - 1, LOWEST + FRAME)
    shown = charts[: rows * columns]
    marked = sorted({step for run in runs for step in run.evaluated})
    steps = [float(row["step"]) for run in begun for row in run.rows]
    span = (min(steps), max(steps))
    each = (width - GAP * (columns - 1)) // columns
    grid = Table.grid(padding=(0, GAP, 1, 0), pad_edge=False)
    for start in range(0, len(shown), columns):
        grid.add_row(
            *(draw(chart, each, lines, span, marked, len(runs) > 1) for chart in shown[start : start + columns])
        )
    left_out = len(charts) - len(shown)
    more = f"{left_out} more charts in a larger window, or by --metric; " if left_out else ""
    foot = Text(f"{more}{MARK} evaluation; lines are means over each column's steps", "dim", no_wrap=True)
    return Group(head, "", grid, foot, *map(Text, absent))


def _heads(runs: Sequence[Follower]) -> Table:
    """A line a run: how far it is, how fast, and whether it is still alive."""
    table = Table.grid(padding=(0, 2))
    names = _names(runs)
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = COLOURS[place % len(COLOURS)] if len(runs) > 1 else "bold"
        label = f"{place + 1}: {name}" if len(runs) > 1 else name
        table.add_row(Text(label, colour), *_facts(run))
    return table


def _facts(run: Follower) -> list[Text]:
    if not run.rows:
        return [Text("not begun yet", "dim")]
    last, steps = run.rows[-1], _steps(run.folder)
    step = int(last["step"])
    pace = [y for _, y in run.curve("time/step")[-20:]]
    seconds = sum(pace) / len(pace) if pace else 0.0
    age = time.time() - (run.folder / "metrics.jsonl").stat().st_mtime
    faults = sum(y for _, y in run.curve("reward/faults"))
    trained: dict[str, Any] = next((row for row in reversed(run.rows) if not is_evaluation(row)), {})
    alarms = sorted(key.removeprefix("alarm/") for key, value in trained.items() if key.startswith("alarm/") and value)
    left = f"about {duration((steps - step) * seconds)} left" if steps and pace else ""
    if steps and step >= steps:
        left = "done"
    words = [
        f"step {step}" + (f"/{steps}" if steps else ""),
        f"{seconds:.2f} s a step" if pace else "",
        left,
        f"newest row {duration(age)} ago",
    ]
    troubles = [*([f"{faults:.0f} faults"] if faults else []), *(f"ALARM {name}" for name in alarms)]
    return [*map(Text, words), Text("  ".join(troubles), "bold red")]


def _charts(runs: Sequence[Follower], panels: Sequence[Panel]) -> list[Chart]:
    known = sorted(set().union(*(run.keys() for run in runs)))
    charts = []
    for panel in panels:
        keys = [key for pattern in panel.keys for key in known if fnmatchcase(key, pattern)]
        lines = [
            _line(run, key, place if len(runs) > 1 else number, number, name if len(runs) == 1 else "", panel)
            for place, run in enumerate(runs)
            for number, (key, name) in enumerate(zip(keys, _short(keys), strict=True))
        ]
        if any(line.points for line in lines):
            charts.append(Chart(visible(panel.title), lines, percent=panel.percent))
    return charts


def _line(run: Follower, key: str, colour: int, number: int, name: str, panel: Panel) -> Line:
    points, evaluated = run.curve(key, panel.floor), key.startswith("eval/")
    low, high = run.curve(f"{key}_low"), run.curve(f"{key}_high")
    whole = evaluated and len(low) == len(high) == len(points)
    interval = {"low": low, "high": high} if whole else {}
    return Line(visible(name), colour, points, dashed=number > 0, marks=evaluated, **interval)


def _absent(metrics: Sequence[str], runs: Sequence[Follower]) -> list[str]:
    """A sentence for each figure that is asked for and that no run has logged."""
    known = sorted(set().union(*(run.keys() for run in runs)))
    sentences = []
    for asked in metrics:
        for key in list(filter(None, asked.split(","))) or [""]:
            if not any(fnmatchcase(one, key) for one in known):
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {visible(near[0])}?" if near else "docs/metrics.md has them all"
                sentences.append(
                    f"--metric = {asked}: {runs[0].folder} logs no figure {key or 'without a name'}; {hint}"
                )
    return sentences


def _chosen(metrics: Sequence[str], runs: Sequence[Follower]) -> list[Panel]:
    known = sorted(set().union(*(run.keys() for run in runs)))
    panels = []
    for asked in metrics:
        keys = tuple(filter(None, asked.split(",")))
        if len(keys) == 1:
            panels += [Panel(key, (key,)) for key in known if fnmatchcase(key, keys[0])]
        else:
            panels.append(Panel(posixpath.commonpath(keys) or asked, keys))
    return panels


def _names(runs: Sequence[Follower]) -> list[str]:
    """The folders' names, or their paths where two are called alike."""
    names = [run.folder.absolute().name for run in runs]
    return [visible(name if names.count(name) == 1 else str(run.folder)) for run, name in zip(runs, names, strict=True)]


def _short(keys: Sequence[str]) -> list[str]:
    """What tells keys of one chart apart: `id` and `ood` of eval/id/accuracy and eval/ood/accuracy; of one: nothing."""
    if len(keys) < 2:
        return [""] * len(keys)
    parts = [key.split("/") for key in keys]
    while all(part[:1] == parts[0][:1] and len(part) > 1 for part in parts):
        parts = [part[1:] for part in parts]
    while all(part[-1:] == parts[0][-1:] and len(part) > 1 for part in parts):
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _steps(folder: Path) -> int | None:
    """How many steps the run will make, from its config; None while it has none."""
    try:
        steps = yaml.safe_load((folder / "config.yaml").read_bytes())["steps"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return steps if isinstance(steps, int) else None
