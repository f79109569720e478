"""The paper's experiments: the configs agree with each other, run with a tiny model, and say what is missing."""

import json
import math
import re
from pathlib import Path

import pytest

from dvpo.cli import main
from dvpo.config import differences
from dvpo.loading import load_config
from dvpo.study import load_study
from dvpo.tasks.named import make_task
from dvpo.trainer import Trainer
from runs import model_folder

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
NAMES = ("math", "science", "dialogue")
OPPONENTS = {"ppo", "grpo", "dr_grpo", "reinforce_pp", "robust_ppo"}
ABLATION = {"dvpo_plain", "dvpo_cons", "dvpo_cons_tail", "dvpo_cons_tail_shift", "dvpo_paper"}
SMALL = (
    "steps=1",
    "model.dtype=float32",
    "sampling.prompts_per_step=2",
    "sampling.samples_per_prompt=2",
    "sampling.max_prompt_length=300",
    "sampling.max_completion_length=8",
    "evaluation.every=0",
    "evaluation.prompts=2",
)


def test_every_file_is_one_of_them():
    assert {path.stem for path in CONFIGS.iterdir()} == {*NAMES, "study"}


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_the_papers_and_the_studys(name: str):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.output, config.steps, config.algorithm) == (f"runs/paper/{name}", 500, "dvpo_paper")
    assert (config.critic.num_quantiles, config.critic.alpha, config.critic.beta) == (200, 0.1, 0.1)
    cells = {cell.algorithm: cell for cell in load_study(CONFIGS / "study.yaml").cells if cell.task == name}
    assert cells.keys() == OPPONENTS | ABLATION
    assert differences(config, cells["dvpo_paper"].config).keys() == {"output", "seed"}
    for cell in cells.values():  # everything equal but what an algorithm is
        changed = {key.split(".")[0] for key in differences(cell.config, cells["ppo"].config)}
        assert changed <= {"algorithm", "output", "seed", "critic", "advantage", "actor"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files in the form of docs/paper.md, as its current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    page = (Path(__file__).parents[1] / "docs" / "paper.md").read_text()
    lines = page.split("```json\n")[1].split("```")[0].splitlines()
    for name, line in zip(("light_r1", "supergpqa"), lines, strict=True):
        row = json.loads(line)
        made = [{**row, "id": f"{name}-{i}", "prompt": [{**row["prompt"][0], "content": f"{i}? "}]} for i in range(40)]
        labels = [{"id": row["id"], "answer": row["answer"]} for row in made]
        for stem, rows in ((name, made), (f"{name}_labels", labels)):
            (tmp_path / "data" / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_makes_a_step_with_a_tiny_model(name: str, data: Path):
    trainer = Trainer(load_config(CONFIGS / f"{name}.yaml", [*SMALL, f"model.path={model_folder()}"]))
    figures = trainer.train_step()
    trainer.close()
    assert figures["reward/missing"] == figures["reward/faults"] == 0
    assert math.isfinite(figures["reward/true"])  # known beside the supervision
    assert math.isfinite(figures["critic/loss"])


@pytest.mark.parametrize(("name", "text"), [("math", r"so \boxed{\frac{1}{2}}"), ("science", r"\boxed{C}")])
def test_a_vote_is_what_stands_in_the_box(name: str, text: str, data: Path):
    task = make_task(load_config(CONFIGS / f"{name}.yaml").task)
    assert task.final_answer(text) == {"math": r"\frac{1}{2}", "science": "C"}[name]
    assert task.final_answer("no box") is None


def test_without_the_weights_the_doctor_says_so_in_one_sentence(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Offline, with an empty cache of models; and without the data, that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(data / "cache"))
    said = []
    for name in (*NAMES, "math"):
        assert main(["doctor", str(CONFIGS / f"{name}.yaml")]) == 2
        said.append(capsys.readouterr().err)
        if name == "dialogue":
            (data / "data").rename(data / "gone")
    for sentence in said[:3]:
        assert re.fullmatch(r"dvpo: model\.path = Qwen/Qwen3-8B cannot be loaded .* \(hf download Qwen/.*\n", sentence)
    assert said[3].startswith("dvpo: task.path: there is no file or folder 'data/light_r1.jsonl'")
