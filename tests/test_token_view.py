"""Records of tokens: when they are kept, what stands in them, that they cost nothing and change nothing."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo import Trainer
from dvpo.embedded import make_tokenizer
from dvpo.encoding import ChatEncoder
from dvpo.settings_learning import CriticConfig
from dvpo.token_view import KEPT_LEVELS, critic_columns, is_shown, token_texts
from runs import Parity, Talk, run_config


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]


def test_the_steps_kept_double_and_end_with_the_last():
    assert [step for step in range(1, 101) if is_shown(step, 100)] == [1, 2, 4, 8, 16, 32, 64, 100]


def test_figures_are_those_of_the_sorted_ensemble():
    # Two heads of four quantiles, the ensemble is their mean, sorted: [0, 1, 2, 3] + [0, 2, 0, 2] / 2 -> 0, 1, 2, 4.
    values_TNM = torch.tensor([[[0.0, 0.0, 2.0, 3.0], [0.0, 4.0, 2.0, 5.0]], [[9.0] * 4, [9.0] * 4]])
    mask_T = torch.tensor([True, False])
    columns = critic_columns(values_TNM, mask_T, CriticConfig(alpha=0.5, beta=0.25))
    assert columns["value"] == [2.0, None]  # (0 + 2 + 2 + 4) / 4
    assert columns["lower"] == [1.0, None]  # the lower half: (0 + 2) / 2
    assert columns["upper"] == [4.0, None]  # the upper quarter
    assert columns["width"] == [4.0, None]  # indices round(.9 * 3) = 3 and round(.1 * 3) = 0
    assert columns["quantiles"] == [[[0.0, 0.0, 2.0, 3.0], [0.0, 4.0, 2.0, 5.0]], None]
    assert columns["levels"] == [0.125, 0.375, 0.625, 0.875]


def test_a_scalar_critic_has_a_value_and_no_law_and_no_critic_has_nothing():
    columns = critic_columns(torch.tensor([[[0.12345678]]]), torch.tensor([True]), CriticConfig())
    assert columns["value"] == [0.1235]
    assert not {"width", "lower", "upper"} & columns.keys()
    assert critic_columns(torch.zeros(3, 0, 0), torch.ones(3, dtype=torch.bool), CriticConfig()) == {}


def test_of_many_quantiles_evenly_spaced_ones_are_kept():
    values_TNM = torch.linspace(0, 1, 200).view(1, 1, 200)
    columns = critic_columns(values_TNM, torch.tensor([True]), CriticConfig())
    assert len(columns["levels"]) == len(columns["quantiles"][0][0]) == KEPT_LEVELS
    assert (columns["quantiles"][0][0][0], columns["quantiles"][0][0][-1]) == (0.0, 1.0)
    assert columns["value"] == [0.5]  # of all of them


@pytest.mark.parametrize("text", ["plain words", "naïve 👩‍👩‍👧 山 <|end|>", "a\x00b"])
def test_the_texts_of_the_tokens_are_the_text_of_all(text: str):
    encoder = ChatEncoder(make_tokenizer())
    tokens = encoder.plain(text)
    texts = token_texts(encoder, tokens, [0] * len(tokens))
    assert len(texts) == len(tokens)
    assert "".join(texts) == text


def test_a_character_does_not_reach_into_another_turn():
    encoder = ChatEncoder(make_tokenizer())
    tokens = [*encoder.plain("é")[:1], *encoder.plain("x")]
    assert token_texts(encoder, tokens, [0, -1]) == ["\ufffd", "x"]


def test_a_run_keeps_the_tokens_of_some_responses(tmp_path: Path):
    settings = ["steps=3", "log.tokens=2", "advantage.missing_reward=mask", "noise.kind=flip", "noise.rate=1"]
    Trainer(run_config(tmp_path / "run", *settings), task=Parity([None])).train()
    rows = rows_of(tmp_path / "run")
    for row in rows[::2]:  # without a reward it leaves the step, and is shown all the same
        assert (row["observed"], set(row["advantages"])) == (None, {0.0})
    assert all(row["observed"] == 1 - row["true"] for row in rows[1::2])
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]
    for row in rows:
        length = len(row["tokens"])
        columns = ("turns", "advantages", "value", "width", "lower", "upper", "quantiles")
        assert {len(row[name]) for name in columns} == {length}
        assert len(row["levels"]) == 8
        for lower, value, upper in zip(row["lower"], row["value"], row["upper"], strict=True):
            assert lower <= value <= upper


def test_what_is_logged_changes_nothing_in_training(tmp_path: Path):
    for name, tokens in (("with", 2), ("without", 0)):
        Trainer(run_config(tmp_path / name, f"log.tokens={tokens}"), task=Parity()).train()
    metrics = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in text.splitlines()]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("with", "without"))
    ]
    assert metrics[0] == metrics[1]
    assert rows_of(tmp_path / "without") == []


def test_the_advantages_kept_are_the_whitened_ones_and_words_of_the_environment_have_no_figures(tmp_path: Path):
    settings = ["algorithm=dvpo_plain", "steps=1", "log.tokens=6", "sampling.max_completion_length=24"]
    Trainer(run_config(tmp_path / "run", *settings), task=Talk()).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "tokens.jsonl").read_text().splitlines()]
    turns = [turn for row in rows for turn in row["turns"]]
    assert {-1, 0} <= set(turns)
    for name in ("advantages", "value", "width", "lower", "upper", "quantiles"):
        figures = [figure for row in rows for figure in row[name]]
        assert [figure is None for figure in figures] == [turn == -1 for turn in turns], name
    # All six responses are kept: whitened over the tokens that train, mean 0 and deviation 1; unwhitened, a mean of
    # about half a reward.
    trained = [row for row in rows if row["observed"] is not None]
    kept = [advantage for row in trained for advantage in row["advantages"] if advantage is not None]
    assert statistics.fmean(kept) == pytest.approx(0, abs=1e-3)
    assert statistics.pstdev(kept) == pytest.approx(1, abs=1e-2)
