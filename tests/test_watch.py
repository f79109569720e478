"""`dvpo watch`: what is read of a run that goes on, what is drawn of it, how it ends."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dvpo.charts import Chart, Line
from dvpo.cli import main
from dvpo.runlog import RunLog
from dvpo.terminal_charts import FRAME, SCALE, binned, draw
from dvpo.watch import PANELS, Follower, picture, watch
from runs import trained


def write(folder: Path, rows: Iterable[dict[str, Any]], ending: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + ending)
    return folder


def steps(first: int, last: int, **figures: Any) -> list[dict[str, Any]]:
    return [{"step": step, "reward/true": step / 10, "time/step": 2.0, **figures} for step in range(first, last + 1)]


def seen(*sources: Path, metrics: Iterable[str] = (), width: int = 120) -> str:
    out = StringIO()
    watch([str(source) for source in sources], list(metrics), True, 1.0, Console(file=out, width=width))
    return out.getvalue()


# Reading


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    run = Follower(write(tmp_path, steps(1, 2), '{"step": 3, "rew'))
    run.read()
    assert [row["step"] for row in run.rows] == [1, 2]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('ard/true": 0.75}\n{"st')
    run.read()
    run.read()
    assert run.curve("reward/true") == [(1, 0.1), (2, 0.2), (3, 0.75)]


def test_a_resume_takes_back_the_rows_that_it_makes_anew(tmp_path: Path) -> None:
    with RunLog(tmp_path, "{}", seed=0, device="cpu") as log:
        for step in (1, 2, 3):
            log.metrics(step, {"reward/true": 0.5})
    run = Follower(tmp_path)
    run.read()
    with RunLog(tmp_path, "{}", seed=0, device="cpu", resume_step=1) as log:
        for step in (2, 3, 4):  # longer than before: the size alone would not tell
            log.metrics(step, {"reward/true": 0.75})
        run.read()
    assert run.curve("reward/true") == [(1, 0.5), (2, 0.75), (3, 0.75), (4, 0.75)]


def test_a_run_may_begin_end_and_begin_again_while_it_is_watched(tmp_path: Path) -> None:
    run = Follower(tmp_path / "run")
    run.read()
    assert run.rows == []
    write(tmp_path / "run", steps(1, 3))
    run.read()
    assert len(run.rows) == 3
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run.read()
    assert run.rows == []


def test_figures_that_are_not_defined_are_left_out_and_wild_ones_held(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "x": None},
        {"step": 2, "x": -50.0},
        {"step": 3, "x": 0.5},
        {"step": 3, "eval/id/accuracy": 1.0},
    ]
    run = Follower(write(tmp_path, rows))
    run.read()
    assert run.curve("x", floor=-1.0) == [(2, -1.0), (3, 0.5)]
    assert run.evaluated == [3]


# Drawing


def test_a_line_rises_from_corner_to_corner_of_the_canvas() -> None:
    chart = Chart("rise", [Line("", 0, [(float(x), float(x)) for x in range(11)])])
    lines = draw(chart, 10 + SCALE, 5 + FRAME, (0, 10)).plain.split("\n")
    canvas = [line[SCALE:] for line in lines[1:6]]
    assert len(lines) == 5 + FRAME
    assert canvas[-1][0] != " " != canvas[0][-1]
    assert canvas[0][0] == " " == canvas[-1][-1]
    assert [lines[1][:SCALE].strip(" ┤"), lines[5][:SCALE].strip(" ┤")] == ["10", "0"]
    # In each row of a rising line the dots lie right of those of the row below.
    firsts = [re.search(r"[^ ]", row).start() for row in canvas]  # type: ignore[union-attr]
    assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize("most", [400_000.0, 2.2e-4, 4.7e-14])
def test_large_and_small_numbers_stand_beside_the_scale_whole(most: float) -> None:
    chart = Chart("many", [Line("", 0, [(0.0, 0.0), (10.0, most)])])
    lines = draw(chart, 10 + SCALE, 9 + FRAME, (0, 10)).plain.split("\n")
    labels = [line[:SCALE].strip(" ┤│") for line in lines[1:10]]
    assert labels[0] == {400_000.0: "400,000", 2.2e-4: "3e-04", 4.7e-14: "6e-14"}[most]


def test_evaluations_are_marked_on_every_axis_and_bear_their_interval() -> None:
    line = Line("id", 0, [(0.0, 0.5), (10.0, 0.5)], [(0.0, 0.1), (10.0, 0.1)], [(0.0, 0.9), (10.0, 0.9)], marks=True)
    text = draw(Chart("accuracy", [line], percent=True), 20 + SCALE, 9 + FRAME, (0, 10), marked=[0, 5, 10]).plain
    title, *canvas, axis, _ = text.split("\n")
    assert title == "accuracy (%)  id 50"
    assert [place for place, sign in enumerate(axis[SCALE:]) if sign == "●"] == [0, 10, 19]
    assert "".join(canvas).count("●") == 2
    dotted = [row for row in canvas if row[SCALE] not in " ●"]
    assert len(dotted) >= 6  # the interval from 10 to 90


def test_means_keep_the_mean_and_one_wild_step_does_not_set_the_scale() -> None:
    points = [(float(x), 1.0) for x in range(1000)]
    points[500] = (500.0, 100.0)
    means = binned(points, 20)
    assert len(means) == 20
    assert sum(y for _, y in means) / 20 == pytest.approx(1.099)
    assert binned(points[:7], 20) == points[:7]
    text = draw(Chart("x", [Line("", 0, points)]), 20 + SCALE, 9 + FRAME, (0, 999)).plain
    assert "100" not in text.split("\n")[1]  # the highest column's mean is 2.98


def test_lines_of_several_runs_bear_their_numbers() -> None:
    lines = [Line("", place, [(0.0, place), (10.0, place)]) for place in (0, 1)]
    rows = draw(Chart("x", lines), 20 + SCALE, 9 + FRAME, (0, 10), numbered=True).plain.split("\n")
    assert rows[0] == "x  1: 0  2: 1.000"
    assert (rows[9][-1], rows[1][-1]) == ("1", "2")


def test_the_usual_charts_of_a_run_that_was_trained(tmp_path: Path) -> None:
    runs = [trained(tmp_path / name, f"algorithm={name}", "steps=3").folder for name in ("dvpo", "grpo")]
    shown = seen(runs[0])
    assert [panel.title for panel in PANELS if panel.title not in shown] == []
    assert re.search(r"^dvpo  step 3/3 .* done  newest row \d+ s ago", shown)
    assert "● evaluation" in shown
    beside = seen(tmp_path)  # the folder that holds both
    assert "1: dvpo" in beside
    assert "2: grpo" in beside
    grpo = seen(runs[1])
    assert "Critic" not in grpo  # it has none, and no empty chart
    assert "Entropy" in grpo


def test_no_line_is_wider_than_the_screen(tmp_path: Path) -> None:
    write(tmp_path, steps(1, 30, **{"actor/loss": 1e-5, "actor/kl": 12345.678, "critic/loss": -3.0}))
    for width in (40, 80, 133):
        assert max(map(len, seen(tmp_path, width=width).split("\n"))) <= width


def test_a_picture_fits_its_screen_and_says_what_it_left_out(tmp_path: Path) -> None:
    keys = ("reward/observed", "critic/loss", "actor/loss", "actor/entropy", "actor/kl", "critic/explained_variance")
    run = Follower(write(tmp_path, steps(1, 30, **dict.fromkeys(keys, 0.5))))
    run.read()
    for height in (24, 40, 70):
        out = StringIO()
        Console(file=out, width=100).print(picture([run], [], 100, height))
        lines = out.getvalue().rstrip("\n").split("\n")
        assert height - 8 <= len(lines) <= height
        assert ("more charts in a larger window" in lines[-1]) == (height == 24)


def test_figures_are_chosen_by_key_by_pattern_and_together(tmp_path: Path) -> None:
    write(tmp_path, steps(1, 3, **{"reward/observed": 0.5, "critic/qr": 1.0, "critic/cvar": 2.0}))
    shown = seen(tmp_path, metrics=["reward/true,reward/observed", "critic/*"])
    titles = re.findall(r"(reward|critic/\w+)  ", shown)
    assert titles == ["reward", "critic/cvar", "critic/qr"]
    assert "true 0.300  ┈ observed 0.500" in shown
    assert "Seconds a step" not in shown


def test_troubles_and_the_time_left_stand_beside_the_run(tmp_path: Path) -> None:
    write(tmp_path / "mine", steps(1, 10, **{"reward/faults": 2.0, "alarm/entropy": 1.0, "alarm/kl": 0.0}))
    (tmp_path / "mine" / "config.yaml").write_text("steps: 100\n")
    shown = seen(tmp_path / "mine", width=160)
    assert "step 10/100  2.00 s a step  about 3 min left" in shown
    assert "20 faults  ALARM entropy" in shown
    assert "ALARM kl" not in shown
    with (tmp_path / "mine" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 10, "eval/id/accuracy": 0.5}\n')
    assert "20 faults  ALARM entropy" in seen(tmp_path / "mine", width=160)  # an evaluation says nothing of alarms


def test_names_and_keys_do_nothing_to_the_terminal(tmp_path: Path) -> None:
    write(tmp_path / "[red]\x1b[31mrun", steps(1, 3, **{"x\x1b[2J": 1.0}))
    shown = seen(tmp_path / "[red]\x1b[31mrun", metrics=["x*"])
    assert "\x1b" not in shown
    assert "[red]␛[31mrun" in shown
    assert "x␛[2J" in shown


# Refusals and the end


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--once"], "nowhere holds no run yet: give a run folder, or leave out --once"),
        (["file.txt"], "file.txt is no folder: give run folders"),
        (["typo.yaml"], "typo.yaml is no folder: give run folders"),
        (["run", "--metric", "reward/treu"], "run logs no figure reward/treu; did you mean reward/true?"),
        (["run", "--metric", ","], "logs no figure without a name"),
        (["run", "--every", "0"], "--every = 0 is no time to wait"),
        (["bad"], "bad/metrics.jsonl is damaged at line 2: remove that line"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    tmp_path: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    write(Path("run"), steps(1, 2))
    write(Path("bad"), steps(1, 1), '{"step"\n{"step": 2}\n')
    assert main(["watch", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_screen_is_redrawn_until_ctrl_c_and_the_last_picture_stays(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-m", "dvpo", "watch", str(tmp_path / "run"), "--every", "0.05"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        wait_for(ours, "not begun yet")
        write(tmp_path / "run", steps(1, 5))
        wait_for(ours, "step 5")
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "reward/true": 0.6}\n')
        wait_for(ours, "step 6")
        process.send_signal(signal.SIGINT)
        rest = wait_for(ours, "● evaluation", after="\x1b[?1049l")  # back on the normal screen
        assert "Reward" in rest
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def wait_for(terminal: int, text: str, after: str = "", seconds: float = 180.0) -> str:
    """Read until the text has come, behind another if that is given; what came behind that."""
    came, end = "", time.monotonic() + seconds
    while text not in _behind(came, after):
        assert time.monotonic() < end, f"{text!r} did not come, but {came[-2000:]!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            came += os.read(terminal, 65536).decode(errors="replace")
    return _behind(came, after)


def _behind(text: str, mark: str) -> str:
    return text.partition(mark)[2] if mark else text


def test_a_figure_that_is_not_there_yet_is_said_and_drawn_once_it_comes(tmp_path: Path) -> None:
    evaluation = {"step": 0, "eval/id/accuracy": 0.5}  # the first row of every run
    write(tmp_path, [evaluation])
    run, out = Follower(tmp_path), StringIO()

    def shown() -> str:
        run.read()
        Console(file=out, width=100).print(picture([run], ["reward/true", "eval/*"], 100, 40, waiting=True))
        return out.getvalue()

    first = shown()
    assert "logs no figure reward/true" in " ".join(first.split())
    assert "eval/id/accuracy" in first
    assert "left" not in first  # nobody knows yet how long a step takes
    write(tmp_path, [evaluation, *steps(1, 2)])
    assert "logs no figure reward/true" not in " ".join(shown().removeprefix(first).split())
