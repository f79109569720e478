"""What comes from outside cannot run code, and mutated configs and data end in a result or a sentence."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.policy import open_policy
from dvpo.rewards import GuardedReward
from dvpo.tasks.named import make_task
from runs import model_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))
import fuzz


@pytest.mark.parametrize("experiment", [fuzz.fuzz_configs, fuzz.fuzz_lines], ids=["configs", "lines"])
def test_mutated_input_is_accepted_or_refused_in_a_sentence(experiment, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # alarms of runs with absurd settings
        result = experiment(60, 7, tmp_path)
    assert result["failures"] == []
    assert all(any(name.endswith(end) for name in result["outcomes"]) for end in ("accepted", "refused"))


@pytest.mark.parametrize(
    ("raised", "what"), [(InputError("seed = -1 is not valid: take another"), "refused"), (KeyError("x"), "traceback")]
)
def test_a_traceback_is_told_from_a_refusal(raised: Exception, what: str):
    def action() -> None:
        raise raised

    assert fuzz.outcome(action)[0] == what


MARK = "import pathlib; pathlib.Path({!r}).touch()\n"


def test_names_in_a_config_are_not_looked_for_beside_the_config_or_the_data(tmp_path: Path, monkeypatch):
    elsewhere, here, made = tmp_path / "downloaded", tmp_path / "here", tmp_path / "made"
    elsewhere.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (elsewhere / "planted.py").write_text(MARK.format(str(made)) + "def reward(**columns): ...\nrow = task = reward\n")
    (elsewhere / "config.yaml").write_text("{reward: {function: 'planted:reward'}, algorithm: 'planted:row'}")
    with pytest.raises(InputError, match="planted"):
        load_config(elsewhere / "config.yaml")
    with pytest.raises(InputError, match="planted"):
        GuardedReward("planted:reward")
    with pytest.raises(InputError, match="planted"):
        make_task(load_config(None, ["task.name=planted:task"]).task)
    assert not made.exists()


def test_a_model_folder_with_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path: Path):
    made = tmp_path / "made"
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "planted", "auto_map": {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}}
        )
    )
    (tmp_path / "planted.py").write_text(MARK.format(str(made)) + "C = M = object\n")
    with pytest.raises(InputError):
        open_policy(tmp_path, torch.device("cpu"), "float32")
    assert not made.exists()


class Planted:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_that_are_a_pickle_with_code_are_refused_and_the_code_is_not_run(tmp_path: Path):
    for source in Path(model_folder()).iterdir():
        if source.suffix != ".safetensors":
            (tmp_path / source.name).write_bytes(source.read_bytes())
    torch.save({"model.embed_tokens.weight": Planted(str(tmp_path / "made"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError):
        open_policy(tmp_path, torch.device("cpu"), "float32")
    assert not (tmp_path / "made").exists()
