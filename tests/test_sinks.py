"""Sinks: W&B and trackio by stand-ins that keep what they are told, TensorBoard itself; refusals; faults end no run."""

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dvpo import Trainer, load_config
from dvpo.cli import main
from dvpo.doctor import report_needs
from dvpo.errors import InputError
from dvpo.runlog import RunLog, read_rows
from dvpo.settings_learning import LogConfig
from dvpo.sinks import PATIENCE
from runs import left_behind, run_config, trained

CONFIG = "seed: 3\nsampling:\n  temperature: 1.2\n"


class Tracker(ModuleType):
    """A package with the part of W&B's and trackio's interface that is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opened: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = self.logins = 0
        self.broken: set[int] = set()
        """Steps at which it raises."""
        self.key = True
        self.up = True
        self.errors = SimpleNamespace(UsageError=type("UsageError", (Exception,), {}))

    def login(self) -> None:
        self.logins += 1
        if not self.key:
            raise self.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **how: Any) -> "Tracker":
        if not self.up:
            raise ConnectionError("no route to host\nmore of it")
        self.opened.append(how)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        if step in self.broken:
            raise ConnectionError("no route to host")
        self.rows.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    return put_in_place("wandb", monkeypatch)


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    return put_in_place("trackio", monkeypatch)


def put_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    return tracker


def open_log(folder: Path, resume_step: int | None = None, **settings: Any) -> RunLog:
    return RunLog(folder, CONFIG, seed=3, device="cpu", resume_step=resume_step, log=LogConfig(**settings))


# What they are given


def test_both_get_the_finite_numbers_of_every_row_and_the_whole_config(
    tmp_path: Path, wandb: Tracker, trackio: Tracker
) -> None:
    with open_log(tmp_path / "mine", wandb=True, trackio=True, project="noise") as log:
        log.metrics(1, {"reward/true": 0.5, "critic/loss": float("nan"), "note": "text", "count": 3})
        log.metrics(1, {"eval/id/accuracy": 0.25})
    for tracker in (wandb, trackio):
        assert tracker.rows == [(1, {"reward/true": 0.5, "count": 3.0}), (1, {"eval/id/accuracy": 0.25})]
        assert tracker.finished == 1
        assert tracker.opened[0]["project"] == "noise"
        assert tracker.opened[0]["config"] == {"seed": 3, "sampling": {"temperature": 1.2}}
    assert wandb.opened[0]["name"] == "mine"
    assert wandb.opened[0]["dir"] == str(tmp_path / "mine")


def test_a_resumed_run_is_the_same_run_and_two_runs_are_two(tmp_path: Path, wandb: Tracker, trackio: Tracker) -> None:
    for folder, step in (("a", None), ("a", 1), ("b", None)):
        open_log(tmp_path / folder, step, wandb=True, trackio=True, name="named").close()
    first, again, other = (how["id"] for how in wandb.opened)
    assert first == again != other
    assert all(how["resume"] == "allow" for how in (*wandb.opened, *trackio.opened))
    # trackio knows a run by its name alone.
    assert [how["name"] for how in trackio.opened] == [f"named-{key}" for key in (first, again, other)]


def test_a_run_of_an_older_version_gets_an_id_when_it_is_resumed(tmp_path: Path, wandb: Tracker) -> None:
    open_log(tmp_path).close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["run_id"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        open_log(tmp_path, 0, wandb=True).close()
    assert len({how["id"] for how in wandb.opened}) == 1


def test_offline_wandb_needs_no_key_and_is_told_so(tmp_path: Path, wandb: Tracker) -> None:
    wandb.key = False
    trained(tmp_path / "run", "steps=1", "log.wandb=true", "log.offline=true")
    assert (wandb.logins, wandb.opened[0]["mode"]) == (0, "offline")
    wandb.key = True
    trained(tmp_path / "online", "steps=1", "log.wandb=true")
    assert (wandb.logins, wandb.opened[1]["mode"]) == (1, None)  # None: WANDB_MODE decides


def test_tensorboard_shows_the_finite_numbers_of_a_resumed_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"reward": 0.5 * step, "note": "text", "loss": float("nan")})
    with open_log(tmp_path, resume_step=2, tensorboard=True) as log:
        log.metrics(3, {"reward": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert events.Tags()["scalars"] == ["reward"]


# What is refused before any long work


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "config.yaml").write_text(f"output: {tmp_path}/run\nmodel: {{path: /no/such/model}}\n")
    assert main(["train", str(tmp_path / "config.yaml"), f"log.{name}=true"]) == 2
    said = capsys.readouterr().err
    assert f"log.{name} = true needs {name}, which is not installed: run `pip install 'dvpo[{name}]'`" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_refused_before_the_model_is_looked_for(tmp_path: Path, wandb: Tracker) -> None:
    wandb.key = False
    config = load_config({"model": {"path": "/no/such/model"}, "output": str(tmp_path / "run"), "log": {"wandb": True}})
    with pytest.raises(
        InputError, match=r"nobody is logged in .* run `wandb login`, set WANDB_API_KEY, or set log.off"
    ):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_that_cannot_be_opened_there_is_refused_and_the_folder_can_be_used(
    tmp_path: Path, wandb: Tracker, trackio: Tracker
) -> None:
    trackio.up = False
    with pytest.raises(InputError, match=r"log.trackio = true, but .* \(ConnectionError: no route to host\)"):
        open_log(tmp_path, wandb=True, trackio=True)
    assert wandb.finished == 1  # nothing is left open
    open_log(tmp_path).close()


# What happens later ends no run


def test_a_sink_that_raises_is_a_counted_fault_and_one_warning(tmp_path: Path, wandb: Tracker) -> None:
    wandb.broken = {2, 3}
    with warnings.catch_warnings(record=True) as said, open_log(tmp_path, wandb=True) as log:
        warnings.simplefilter("always")
        for step in range(1, 5):
            log.metrics(step, {"reward/true": step / 10})
    assert [step for step, _ in wandb.rows] == [1, 4]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    faults = list(read_rows(tmp_path / "faults.jsonl"))
    message = "ConnectionError: no route to host"
    assert faults == [{"step": n, "kind": "sink", "sink": "wandb", "message": message} for n in (2, 3)]
    assert [str(warning.message) for warning in said] == [
        "step 2: log.wandb failed (ConnectionError: no route to host); the run goes on, and each row that is missing "
        "there is a row of faults.jsonl"
    ]


def test_a_sink_that_never_recovers_is_left_alone_and_one_that_does_is_not(tmp_path: Path, wandb: Tracker) -> None:
    wandb.broken = {*range(1, PATIENCE), *range(PATIENCE + 1, 99)}
    log = open_log(tmp_path, wandb=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(1, 3 * PATIENCE):
            log.metrics(step, {"reward/true": 0.0})
    log.close()
    assert f"failed {PATIENCE} times in a row and is left alone" in str(said[-1].message)
    assert len(said) == 2
    assert [step for step, _ in wandb.rows] == [PATIENCE]
    assert len(list(read_rows(tmp_path / "faults.jsonl"))) == PATIENCE - 1 + PATIENCE


def test_a_resumed_run_goes_on_without_a_sink_that_cannot_be_opened(tmp_path: Path, trackio: Tracker) -> None:
    open_log(tmp_path, trackio=True).close()
    trackio.up = False
    with pytest.warns(UserWarning, match="log.trackio failed"), open_log(tmp_path, 0, trackio=True) as log:
        log.metrics(1, {"reward/true": 0.0})
    assert [row["kind"] for row in read_rows(tmp_path / "faults.jsonl")] == ["sink"]


@pytest.mark.filterwarnings("ignore:step 1")
def test_training_is_the_same_whatever_a_sink_does(tmp_path: Path, wandb: Tracker) -> None:
    wandb.broken = {1}
    trained(tmp_path / "with", "log.wandb=true")
    trained(tmp_path / "without")
    one, other = left_behind(tmp_path / "with"), left_behind(tmp_path / "without")
    assert [row["kind"] for row in one.pop("faults.jsonl")] == ["sink"]
    assert other.pop("faults.jsonl") == []
    assert one == other


def test_the_trial_of_doctor_goes_nowhere(tmp_path: Path, wandb: Tracker) -> None:
    config = run_config(tmp_path / "run", "log.wandb=true", "task.name=math")
    report_needs(config, Console(quiet=True))
    assert (wandb.logins, wandb.opened) == (1, [])
