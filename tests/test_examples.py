"""The examples run as they stand."""

import json
import subprocess
import sys
from pathlib import Path

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
