"""Preference pairs: who is told apart, wrong preferences at the promised rate, sides by prompt, and bad files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.preferences import Pair, _told_apart, make_pairs, read_pairs
from dvpo.sampling import Episode
from dvpo.tasks import Example
from dvpo.tasks.math import parse_answer

SETTINGS: dict[str, Any] = {
    "sampling": {"samples_per_prompt": 4, "max_completion_length": 28, "batch_size": 64},
    "device": "cpu",
}


def episodes_of(*texts: str, name: str = "p") -> list[Episode]:
    episodes = [Episode(Example(name, "q"), visit=0, sample=i, prompt_tokens=[1]) for i in range(len(texts))]
    for episode, text in zip(episodes, texts, strict=True):
        episode.messages.append({"role": "assistant", "content": text})
    return episodes


NAN = float("nan")


@pytest.mark.parametrize(
    ("worth", "pair"),
    [
        ([0.0, 0.0, 1.0, 1.0], ("c", "a")),  # the first against the first of another worth
        ([1.0, 0.5, 0.0, 1.0], ("a", "b")),
        ([1.0, NAN, 0.0, 0.0], ("a", "c")),
        ([NAN, 0.0, 1.0, 0.0], None),
        ([1.0, 1.0, 1.0, 1.0], None),
    ],
)
def test_the_first_answer_meets_the_first_one_of_another_known_worth(worth: list[float], pair: Any):
    found = _told_apart(episodes_of("a", "b", "c", "d"), worth, wrong=0.0, seed=0)
    assert [(p.chosen, p.rejected) for p in found] == ([] if pair is None else [pair])


def test_equal_texts_make_no_pair_whatever_they_are_worth():
    assert _told_apart(episodes_of("a", "a"), [0.0, 1.0], wrong=0.0, seed=0) == []


def test_the_promised_share_of_preferences_is_turned_and_says_so_and_shares_are_nested():
    def turned(wrong: float) -> set[int]:
        made = [_told_apart(episodes_of("a", "b", name=str(i)), [1.0, 0.0], wrong, seed=0)[0] for i in range(4000)]
        assert all((pair.chosen == "b") == bool(pair.swapped) for pair in made)
        return {i for i, pair in enumerate(made) if pair.swapped}

    few, many = turned(0.1), turned(0.3)
    assert few < many
    assert len(many) / 4000 == pytest.approx(0.3, abs=0.022)  # three standard errors
    later = [[replace(episode, visit=visit) for episode in episodes_of("a", "b")] for visit in range(60)]
    assert 15 < sum(bool(_told_apart(pair, [1.0, 0.0], 0.5, seed=0)[0].swapped) for pair in later) < 45


def test_pairs_of_the_shipped_model_are_ordered_by_the_verifier_and_keyed():
    config = load_config(SETTINGS)
    pairs = make_pairs(config, 12)
    for pair in pairs:
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        right = sum(map(int, re.findall(r"[+-]?[0-9]+", pair.prompt[0]["content"])))
        assert parse_answer(pair.chosen) == right != parse_answer(pair.rejected)
    assert len(pairs) == 12
    assert make_pairs(load_config(SETTINGS, ["sampling.batch_size=24"]), 12) == pairs


def test_a_prompt_is_on_one_side_only_and_a_larger_share_holds_out_the_same_and_more():
    pairs = [Pair(f"prompt {i % 500}", "a", str(i)) for i in range(1000)]
    held = {share: {p.prompt for p in pairs if p.held_out(share)} for share in (0.1, 0.3)}
    kept = {p.prompt for p in pairs if not p.held_out(0.1)}
    assert held[0.1] < held[0.3]
    assert held[0.1].isdisjoint(kept)
    assert len(held[0.1]) == pytest.approx(50, abs=20)


def test_what_the_command_writes_is_read_back_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(json.dumps(SETTINGS))
    command = ["reward-model", "pairs.jsonl", "--from-task", "run.yaml", "--pairs", "5", "--wrong", "0.5"]
    assert main(command) == 0
    assert read_pairs("pairs.jsonl") == make_pairs(load_config(SETTINGS), 5, wrong=0.5)
    before = Path("pairs.jsonl").read_bytes()
    assert main(command) == 2
    assert Path("pairs.jsonl").read_bytes() == before


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 is \\[\\]; write one JSON object"),
        (json.dumps({"prompt": "q", "chosen": "a"}), "line 1 has no sound 'rejected'"),
        (json.dumps({**GOOD, "prompt": [{"role": "user"}]}), "line 1 has no sound 'prompt'"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "rejected": "a"}), "line 2 prefers a completion to itself"),
        (json.dumps({**GOOD, "swapped": 1}), "line 1 has swapped = 1"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path: Path, text: str, words: str):
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        read_pairs(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read \(No such file or directory\)"):
        read_pairs(tmp_path / "none.jsonl")


def test_a_task_without_truth_and_a_single_sample_make_no_pairs(tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    files = ["task.name=files", f"task.path={tmp_path / 'prompts.jsonl'}"]
    for overrides, words in (
        (files, "cannot tell right from wrong"),
        (["sampling.samples_per_prompt=1"], "makes no pair"),
    ):
        with pytest.raises(InputError, match=words):
            make_pairs(load_config(SETTINGS, overrides), 2)
