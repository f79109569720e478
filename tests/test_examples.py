"""The examples run as they stand."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dvpo import Trainer, load_config
from dvpo.runlog import read_rows

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_an_own_reward_trains_an_own_llama_with_another_tokenizer_on_own_chat_prompts(tmp_path: Path):
    subprocess.run(
        [sys.executable, str(EXAMPLES / "bring_your_own_reward.py"), str(tmp_path)], check=True, cwd=tmp_path
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"
    steps = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "actor/loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["reward/faults"] == 0 for row in steps)
    assert any(0 < row["reward/observed"] < 1 for row in steps)
    texts = list(read_rows(tmp_path / "run" / "completions.jsonl"))
    assert {text["prompt"][0]["role"] for text in texts} == {"user"}
    assert (tmp_path / "run" / "checkpoint-2" / "policy" / "tokenizer.json").exists()


# A trained critic by itself, on a run of one step: what it knows is little, what is printed must hold all the same.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dvpo"
    sampling = {"prompts_per_step": 2, "samples_per_prompt": 2}
    Trainer(
        load_config({"output": str(folder), "steps": 1, "sampling": sampling, "evaluation": {"prompts": 2}})
    ).train()
    return folder


def printed(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_reranking_moves_answers_and_makes_none(run: Path, capsys, monkeypatch) -> None:
    said = printed("critic_rerank.py", capsys, monkeypatch, run, 16, 4)
    places = [float(x) for x in re.findall(r"place \d by the critic +([\d.]+) \[", said)]
    (chance,) = map(float, re.findall(r"taken at random +([\d.]+)", said))
    (bound,) = map(float, re.findall(r"right one if any +([\d.]+)", said))
    assert len(places) == 4
    assert sum(places) / 4 == pytest.approx(chance, abs=0.1)
    assert 0 < chance < bound
    assert max(places) <= bound
    assert re.search(r"first place less chance: [+-][\d.]+ points \[[+-]", said)
    assert re.search(r"in order: +[\d.]+ \[.* prompts that have both; chance 50%", said)


def test_the_best_of_one_is_any_and_nothing_beats_the_bound(run: Path, capsys, monkeypatch) -> None:
    said = printed("critic_best_of_n.py", capsys, monkeypatch, run, 16, 4)
    rows = {
        int(n): [float(x) for x in re.findall(r"([\d.]+) \[", rest)] for n, rest in re.findall(r"│ (\d+) │(.*)", said)
    }
    assert rows.keys() == {1, 2, 4}
    assert len(set(rows[1])) == 1
    assert all(max(row) == row[3] for row in rows.values())
    assert rows[1][3] <= rows[2][3] <= rows[4][3]


def test_doubtful_tokens_are_marked_beside_the_mistake(run: Path, capsys, monkeypatch) -> None:
    said = printed("critic_doubtful_tokens.py", capsys, monkeypatch, run, 16)
    shown = re.findall(r"^(.*)>(.)<(.*?) +value ([\d.-]+) -> ([\d.-]+)   the mistake: (.*)$", said, re.MULTILINE)
    assert shown
    for left, token, right, before, behind, mistake in shown:
        first, operand, result = re.fullmatch(r"(\d+)([+-]\d+)=(\d+);", mistake).groups()
        assert int(first) + int(operand) != int(result)
        assert mistake in left + token + right
        assert float(behind) <= float(before)
    assert re.search(r"in \d+ answers with a wrong step, .* a token taken at random, \d+% \(chance\)", said)
