"""Training a reward model: the loss by formula, a preference that is learnt, accuracy by hand, the command."""

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.preferences import Pair
from dvpo.reward_model import RewardModel, make_reward_model, open_reward_model
from dvpo.reward_training import Result, Training, bradley_terry_loss, train_folder, train_reward_model
from runs import model_folder

CPU = torch.device("cpu")


def pairs_by_letter(count: int, seed: int = 0) -> list[Pair]:
    """Whoever has a `z` in it is preferred."""
    rng = random.Random(seed)
    pairs = []
    for i in range(count):
        plain, other = ("".join(rng.choices("abcd", k=5)) for _ in range(2))
        at = rng.randrange(5)
        pairs.append(Pair([{"role": "user", "content": f"{i}"}], plain[:at] + "z" + plain[at + 1 :], other))
    return pairs


# The loss


def test_the_loss_by_hand_and_its_gradient_by_the_formula():
    # Gaps 0, log 3, -log 3: -log(1/2) = log 2, -log(3/4) = log 4/3, -log(1/4) = log 4.
    gaps = torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64)
    chosen_B = (gaps + 0.3).requires_grad_()
    rejected_B = torch.full_like(gaps, 0.3).requires_grad_()
    loss_B = bradley_terry_loss(chosen_B, rejected_B)
    assert loss_B.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)])
    loss_B.sum().backward()
    # d/d chosen = -(1 - sigmoid(gap)) = -(1/2, 1/4, 3/4), and the opposite for the rejected one.
    assert chosen_B.grad.tolist() == pytest.approx([-0.5, -0.25, -0.75])
    assert rejected_B.grad.tolist() == pytest.approx([0.5, 0.25, 0.75])


def test_the_loss_stays_finite_where_a_logarithm_of_a_sigmoid_would_not():
    chosen_B = torch.tensor([-200.0], requires_grad=True)
    loss_B = bradley_terry_loss(chosen_B, torch.zeros(1))
    loss_B.sum().backward()
    assert float(loss_B.detach()) == 200.0
    assert float(chosen_B.grad) == -1.0
    assert torch.sigmoid(torch.tensor(-200.0)).log().isinf()


def test_the_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3, 1\)"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1))


# Training


def test_a_trivial_preference_is_learnt_and_holds_for_prompts_that_were_held_out():
    model = make_reward_model(model_folder(), CPU)
    results = train_reward_model(model, pairs_by_letter(400), Training(epochs=4, held_out=0.25))
    assert [result.epoch for result in results] == [0, 1, 2, 3, 4]
    assert results[0].accuracy < 0.8
    assert results[-1].interval.low > 0.9
    assert results[-1].loss < 0.2 < results[1].loss
    assert results[-1].known == 0  # no pair says whether it is swapped


def test_training_is_the_same_for_the_same_seed_and_another_for_another():
    def score(seed: int) -> float:
        model = make_reward_model(model_folder(), CPU)
        train_reward_model(model, pairs_by_letter(40), Training(epochs=1, held_out=0.25, seed=seed))
        return float(model.judge([model.encode("a", "z")]))

    assert score(0) == score(0) != score(1)


class Scripted(RewardModel):
    """Scores a conversation by the number in the completion."""

    def judge(self, rows):
        texts = [self.tokenizer.decode(row) for row in rows]
        return torch.tensor([float(text.split("|>")[-2].removesuffix("<|end")) for text in texts])


def test_accuracy_by_hand_with_ties_as_misses_and_swapped_pairs_judged_by_the_truth():
    fresh = make_reward_model(model_folder(), CPU)
    model = Scripted(fresh.model, fresh.tokenizer)
    prompts = [[{"role": "user", "content": str(i)}] for i in range(40)]
    held_out = next(prompt for prompt in prompts if Pair(prompt, "1", "0").held_out(0.2))
    learnt = next(prompt for prompt in prompts if not Pair(prompt, "1", "0").held_out(0.2))
    scores = [
        ("3", "1", False),
        ("1", "3", True),
        ("2", "1", True),
        ("2", "2", True),
        ("5", "4", None),
        ("1", "2", False),
    ]
    pairs = [Pair(held_out, chosen, rejected, swapped) for chosen, rejected, swapped in scores]
    before, _ = train_reward_model(model, [*pairs, Pair(learnt, "1", "0")], Training(epochs=1, held_out=0.2))
    # As labelled the first, third and fifth; by the truth the first and the second of the five that are known.
    assert before == Result(epoch=0, loss=None, pairs=6, agreed=3, known=5, right=2)
    interval = binomtest(3, 6).proportion_ci(method="wilson")
    assert before.interval == pytest.approx((interval.low, interval.high))


def test_a_last_batch_that_is_not_full_is_learnt_from_too():
    seen = []

    class Watched(RewardModel):
        def scores(self, rows):
            seen.extend(map(tuple, rows) if torch.is_grad_enabled() else ())
            return super().scores(rows)

    fresh = make_reward_model(model_folder(), CPU)
    model, pairs = Watched(fresh.model, fresh.tokenizer), pairs_by_letter(30)
    train_reward_model(model, pairs, Training(epochs=1, batch_size=8, held_out=0.25))
    learnt = [pair for pair in pairs if not pair.held_out(0.25)]
    assert len(learnt) % 8
    assert sorted(seen) == sorted(tuple(model.encode(p.prompt, t)) for p in learnt for t in (p.chosen, p.rejected))


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(pair.row()) + "\n" for pair in pairs_by_letter(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    return tmp_path


def test_the_command_writes_a_folder_that_scores_and_says_how_it_was_made(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--model", model_folder(), "--output", "rm", "--epochs", "1", "--held-out", "0.3", "--device", "cpu"]
    assert main(["reward-model", "pairs.jsonl", *words]) == 0
    record = json.loads((here / "rm" / "reward_model.json").read_text())
    last = record["results"][-1]
    assert (record["pairs"], record["epochs"], len(record["results"])) == ("pairs.jsonl", 1, 2)
    assert last["accuracy"] == last["agreed"] / last["pairs"]
    assert f"{100 * last['accuracy']:.1f}% [" in capsys.readouterr().out
    assert open_reward_model("rm", CPU).judge([[1, 2, 3]]).isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "pairs.jsonl"], "--output = pairs.jsonl is there already: name another folder"),
        (["--output", "none/rm"], "there is no folder none"),
        (["--model", "./none"], "--model: './none' cannot be loaded as a sequence classifier"),
        (["--epochs", "0"], "--epochs = 0 is out of range: take a positive number"),
        (["--lr", "nan"], "--lr = nan is out of range"),
        (["--held-out", "1"], "--held-out = 1.0 is out of range: take a share between 0 and 1"),
        (["--held-out", "0.0001"], "leaves 60 pairs to learn from and 0 to test on"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert main(["reward-model", "pairs.jsonl", "--model", model_folder(), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["pairs.jsonl"]


def test_a_disk_that_is_full_leaves_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch):
    def full(model: object, folder: Path, **options: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    settings = Training(epochs=1, held_out=0.3)
    with pytest.raises(InputError, match="the disk is full"):
        train_folder("pairs.jsonl", model_folder(), "rm", settings, "cpu", "float32", Console(file=io.StringIO()))
    assert [path.name for path in here.iterdir()] == ["pairs.jsonl"]
