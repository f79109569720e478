"""Reward models: what is scored, folders that are refused, a round trip, and a reward of a training run."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dvpo import Trainer
from dvpo.embedded import END, make_tokenizer
from dvpo.errors import InputError
from dvpo.reward_model import ModelReward, RewardModel, make_reward_model, open_reward_model
from dvpo.runlog import read_rows
from runs import Parity, model_folder, run_config
from tiny_models import with_begin_token

CPU = torch.device("cpu")
CHAT = [{"role": "user", "content": "2+2="}]
END_ID = make_tokenizer().convert_tokens_to_ids(END)


@pytest.fixture
def model() -> RewardModel:
    return make_reward_model(model_folder(), CPU)


@pytest.fixture
def saved(model: RewardModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "rm", {"made": "here"})
    return tmp_path / "rm"


# What is scored


def test_a_conversation_is_encoded_by_the_chat_template_and_two_strings_are_joined_and_closed(model: RewardModel):
    def text(tokens: list[int]) -> str:
        return model.tokenizer.decode(tokens)

    assert text(model.encode(CHAT, "4")) == "<|user|>2+2=<|end|><|assistant|>4<|end|>"
    turns = [{"role": "assistant", "content": "3"}, {"role": "user", "content": "no"}]
    assert text(model.encode(CHAT, turns)) == "<|user|>2+2=<|end|><|assistant|>3<|end|><|user|>no<|end|>"
    assert text(model.encode("2+2=", "4")) == "2+2=4<|end|>"
    begun = [*CHAT, {"role": "assistant", "content": "is "}]
    assert text(model.encode(begun, "4")) == "<|user|>2+2=<|end|><|assistant|>is 4<|end|>"
    with_begin_token(model.tokenizer)
    assert text(model.encode("2+2=", "4")) == text(model.encode("<|bad|>2+2=", "4")) == "<|bad|>2+2=4<|end|>"


def test_a_conversation_beyond_the_context_keeps_its_last_tokens(model: RewardModel):
    tokens = model.encode("a" * 600, "b")
    assert len(tokens) == 512  # the embedded model's context
    assert tokens[-2:] == model.encode("b", "")


def test_a_score_does_not_depend_on_the_rows_beside_it_nor_on_their_order(model: RewardModel, monkeypatch):
    rows = [model.encode(CHAT, "x" * n) for n in (1, 40, 7, 0, 22)]
    alone = torch.cat([model.judge([row]) for row in rows])
    assert alone.unique().numel() == 5
    assert torch.allclose(model.judge(rows), alone, atol=1e-5)
    # By like length, at most so many sequences and so many tokens, padding included; a longer one by itself.
    most = 2 * sorted(map(len, rows))[-2]
    monkeypatch.setattr("dvpo.reward_model.SCORING_TOKENS", most)
    judged: list[tuple[int, int]] = []
    scores = RewardModel.scores
    monkeypatch.setattr(
        RewardModel, "scores", lambda self, some: judged.append((len(some), max(map(len, some)))) or scores(self, some)
    )
    assert torch.allclose(model.judge(rows), alone, atol=1e-5)
    assert sum(count for count, _ in judged) == len(rows)
    assert all(count * width <= most or count == 1 for count, width in judged)
    assert 1 < len(judged) < len(rows)
    monkeypatch.setattr("dvpo.reward_model.SCORING_BATCH", 2)
    assert torch.allclose(model.judge(rows[::-1]), alone.flip(0), atol=1e-5)


def test_the_score_is_the_head_at_the_last_token(model: RewardModel):
    row = model.encode(CHAT, "4")
    hidden_SD = model.model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
    expected = hidden_SD[-1] @ model.model.score.weight[0]
    assert torch.allclose(model.judge([row, [*row, *row]])[0], expected, atol=1e-5)


def test_a_tokenizer_without_a_pad_token_pads_by_its_end_and_scores_do_not_depend_on_it(tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    make_reward_model(model_folder(), CPU).model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = open_reward_model(tmp_path, CPU)
    assert model.model.config.pad_token_id == END_ID
    rows = [model.encode(CHAT, "x" * n) for n in (1, 9)]
    assert torch.allclose(model.judge(rows), torch.cat([model.judge([row]) for row in rows]), atol=1e-5)


# Folders


def same_weights(one: RewardModel, other: RewardModel) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_saved_model_scores_the_same_here_and_in_transformers(model: RewardModel, saved: Path):
    row = model.encode(CHAT, "4")
    ours = open_reward_model(saved, CPU)
    assert same_weights(ours, model)
    assert torch.allclose(ours.judge([row]), model.judge([row]), atol=1e-6)
    theirs = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    tokens = AutoTokenizer.from_pretrained(saved)(
        "<|user|>2+2=<|end|><|assistant|>4<|end|>", add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.allclose(theirs(**tokens).logits[0], model.judge([row]), atol=1e-5)
    assert json.loads((saved / "reward_model.json").read_text()) == {"made": "here"}
    assert [path.name for path in saved.parent.iterdir()] == ["rm"]  # nothing half-written beside it


def test_a_fresh_head_follows_the_seed_and_a_trained_one_is_kept(model: RewardModel, saved: Path):
    assert same_weights(make_reward_model(model_folder(), CPU, seed=0), model)
    assert not same_weights(make_reward_model(model_folder(), CPU, seed=1), model)
    assert same_weights(make_reward_model(saved, CPU, seed=1), model)


def test_folders_that_are_no_reward_model_are_refused_in_one_sentence(saved: Path, tmp_path: Path):
    two = tmp_path / "two"
    AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2).save_pretrained(two)
    make_tokenizer().save_pretrained(two)
    for folder, words in (
        (tmp_path / "none", "holds no model: check the path, or make one by `dvpo reward-model`"),
        (Path(model_folder()), "holds a Qwen3ForCausalLM, no reward model"),
        (two, "holds a model with 2 labels, no reward model"),
    ):
        with pytest.raises(InputError, match=words) as refusal:
            open_reward_model(folder, CPU)
        assert str(refusal.value).startswith(f"reward.function: {str(folder)!r}")
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer|with its tokenizer"):
        open_reward_model(saved, CPU)


# As a reward


def test_a_training_step_observes_the_scores_of_the_model_beside_the_truth(model: RewardModel, saved: Path):
    config = run_config(saved.parent / "run", f"reward.function=path:{saved}", "steps=1", "device=cpu")
    Trainer(config, task=Parity()).train()
    rows = [row for row in read_rows(saved.parent / "run" / "completions.jsonl") if row["step"] == 1]
    assert len(rows) == 4
    for row in rows:
        expected = model.judge([model.encode(row["prompt"], row["completion"])])
        assert row["observed"] == pytest.approx(float(expected), abs=1e-5)
        assert row["true"] in (0.0, 1.0)


def test_a_missing_chat_template_shows_before_the_run_is_begun(saved: Path):
    (saved / "chat_template.jinja").unlink()
    config = run_config(saved.parent / "run", f"reward.function=path:{saved}", "device=cpu")
    with pytest.raises(InputError, match=r"reward\.function: .*tokenizer has no chat template"):
        Trainer(config, task=Parity())
    assert not (saved.parent / "run").exists()


def test_a_score_that_is_not_finite_is_a_fault_and_no_reward(model: RewardModel):
    bad = model.tokenizer("~").input_ids[0]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[bad] = math.nan
    scores = ModelReward(model)([CHAT, CHAT], ["4", "~"], [[1], [1]], {})
    assert scores.rewards[0] is not None
    assert scores.rewards[1] is None
    assert [(fault.kind, fault.index) for fault in scores.faults] == [("non_finite", 1)]
