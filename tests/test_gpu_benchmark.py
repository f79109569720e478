"""The benchmark for GPUs runs, on the CPU with tiny sizes; a wrong kernel is found."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


def test_the_smoke_run_measures_everything_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(output)])
    assert gpu.main() == 0
    result = json.loads(output.read_text())
    assert result["smoke"] is True
    assert result["machine"]["gpu"] is None
    assert all(0 <= error < 1e-5 for error in result["errors"].values())
    assert all(row["ms"] > 0 for row in result["kernels"].values())
    assert result["sampling"]["tokens_per_second"] > 0
    sizes = result["sizes"]
    for name in ("dvpo", "ppo"):
        assert result["training"][name]["time/step"] > 0
        assert result["training"][name]["tokens"] == sizes["prompts"] * sizes["samples"] * sizes["completion"]


def test_a_wrong_kernel_fails_the_command(monkeypatch: pytest.MonkeyPatch):
    right = gpu.critic_terms

    def wrong(*arguments):
        return {name: term * (1.001 if name == "shape" else 1) for name, term in right(*arguments).items()}

    monkeypatch.setattr(gpu, "critic_terms", wrong)
    assert gpu.terms_error(gpu.SMOKE, "cpu") > gpu.RIGHT


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "--smoke" in capsys.readouterr().err


def test_the_shape_is_that_of_qwen3_of_six_hundred_million_parameters(tmp_path: Path):
    """Counted, not made: 596 million with tied embeddings."""
    config = AutoConfig.from_pretrained(gpu.write_model(tmp_path, gpu.Sizes()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 596_049_920
