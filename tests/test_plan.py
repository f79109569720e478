"""`dvpo doctor --gpus N`: a table without a GPU and without weights, and refusals of what could not start."""

import re
import sys
from pathlib import Path

import pytest

from dvpo.cli import main
from dvpo.config import to_yaml
from runs import run_config

ROOT = Path(__file__).resolve().parents[1]
SHAPE = f"model.path={ROOT}/configs/shapes/qwen3_1_7b"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(to_yaml(run_config(Path("run"))))
    return "good.yaml"


def table(out: str) -> dict[str, float]:
    return {name.strip(): float(size) for name, size in re.findall(r"^ +(\S.*?) {2,}([\d.e+-]+) *$", out, re.M)}


def test_each_of_so_many_gpus_is_told_what_it_holds(config: str, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", config, "--gpus", "2", SHAPE, "distributed.strategy=fsdp"]) == 0
    out = capsys.readouterr().out
    assert f"dvpo, {SHAPE.partition('=')[2]}: predicted for each of 2 GPUs by fsdp, not measured" in out
    sizes = table(out)
    # 1.72 billion weights of the policy and as many of the critic's trunk (tied, so its embeddings are the head's).
    assert sizes["weights"] == 6.9  # 4 bytes of each, over two
    assert sizes["moments of AdamW"] == 13.8
    assert sizes["host memory of all, while models are opened"] == 27.5
    largest = max(sizes["an update"], sizes["sampling: keys and values, weights in the compute type"])
    assert sizes["peak: weights, moments, the larger of sampling and update"] == pytest.approx(20.6 + largest, abs=0.2)
    assert "Most of it is weights and moments: more GPUs" in out
    assert not Path("run").exists()


def test_one_gpu_may_take_the_embedded_model(config: str, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", config, "--gpus", "1", "model.path=embedded"]) == 0
    out = capsys.readouterr().out
    assert "embedded: predicted for one GPU, not measured" in out
    assert 0 < table(out)["weights"] < 0.01
    assert "host memory" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus = 0 is no number of GPUs: give 1 or more"),
        (["--gpus", "99"], "sampling.prompts_per_step = 2 is less than the 99 processes"),
        (["--gpus", "2", "critic.replay=1"], "critic.replay = 1 keeps responses on one process"),
        (["--gpus", "2", "sampling.engine=vllm"], "gives a server the weights of one process"),
        (["--gpus", "1", "model.path=./none"], "model.path = ./none is no folder"),
        (["--gpus", "1", "model.path=./empty"], "has no config.json that transformers reads"),
        (["--gpus", "1", "model.path=./bad"], "has no config.json that transformers reads"),
        (
            ["--gpus", "1", "model.path=./t5"],
            "is no causal language model, or of a family whose memory is not predicted",
        ),
        (["--gpus", "1", SHAPE, "model.lora.rank=4", "model.lora.targets=[nothing]"], "dvpo: model.lora.targets"),
    ],
)
def test_what_could_not_start_is_refused(
    config: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    for name, text in (("bad", '{"model_type": "qwen3", "hidden_size": "wide"}'), ("t5", '{"model_type": "t5"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    assert main(["doctor", config, *words]) == 2
    assert said in capsys.readouterr().err


def test_without_a_config_or_without_peft_it_says_what_to_do(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(["doctor", "--gpus", "8"]) == 2
    assert "dvpo doctor CONFIG.yaml --gpus 8" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["doctor", config, "--gpus", "1", SHAPE, "model.lora.rank=4"]) == 2
    assert "needs peft" in capsys.readouterr().err
