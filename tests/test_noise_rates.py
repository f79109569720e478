"""Rates of false rewards: counted on trusted prompts, or known to the user; what a correction may make of them."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.core.masks import identity
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.noise import make_noise
from dvpo.noise_rates import RateEstimator
from dvpo.shaping import NO_RATES
from dvpo.tasks import Example
from dvpo.trainer import Trainer
from runs import Parity, run_config

EXAMPLES = [Example(str(i), "") for i in range(1000)]
IDS = [example.id for example in EXAMPLES]


def counted(observed: list[float], true: list[float]) -> RateEstimator:
    """An estimator that trusts everything and has seen these responses."""
    estimator = RateEstimator(EXAMPLES, 1.0, seed=0)
    estimator.observe(IDS[: len(true)], torch.tensor(observed), torch.tensor(true), identity)
    return estimator


def repeated(false_positives: int, wrong: int, false_negatives: int, right: int) -> RateEstimator:
    observed = [1.0] * false_positives + [0.0] * (wrong - false_positives)
    observed += [0.0] * false_negatives + [1.0] * (right - false_negatives)
    return counted(observed, [0.0] * wrong + [1.0] * right)


# Who is trusted


def test_the_share_is_exact_keyed_by_the_seed_and_nested() -> None:
    trusted = {share: RateEstimator(EXAMPLES, share, seed=3).trusted for share in (0.001, 0.05, 0.2)}
    assert [len(ids) for ids in trusted.values()] == [1, 50, 200]
    assert trusted[0.001] < trusted[0.05] < trusted[0.2]
    assert RateEstimator(EXAMPLES[::-1], 0.05, seed=3).trusted == trusted[0.05]
    assert RateEstimator(EXAMPLES, 0.05, seed=4).trusted != trusted[0.05]


def test_the_smallest_share_trusts_somebody() -> None:
    assert len(RateEstimator(EXAMPLES[:3], 0.01, seed=0).trusted) == 1


def test_what_is_not_trusted_is_not_looked_at() -> None:
    some = RateEstimator(EXAMPLES, 0.3, seed=0)
    true = (torch.arange(1000) % 2).float()
    observed = true.clone()
    outside = torch.tensor([i not in some.trusted for i in IDS])
    for lie in (1 - true[outside], torch.full_like(true[outside], math.nan)):
        other = RateEstimator(EXAMPLES, 0.3, seed=0)
        other.observe(IDS, observed.masked_scatter(outside, lie), true.masked_scatter(outside, lie), identity)
        assert other.figures()["noise/trusted"] == 300
        assert (other.false_positives.wrong, other.false_negatives.wrong) == (0, 0)


# What is counted


def test_the_estimate_is_jeffreys_mean_of_each_kind_of_error_apart() -> None:
    figures = repeated(3, 29, 12, 49).figures()
    assert figures["noise/false_positive"] == pytest.approx(3.5 / 30)
    assert figures["noise/false_negative"] == pytest.approx(12.5 / 50)
    assert figures["noise/trusted"] == 78


def test_unknown_and_missing_rewards_and_graded_truths_are_not_counted() -> None:
    nan = math.nan
    estimator = counted([1.0, nan, 0.0, 1.0], [0.0, 1.0, nan, 0.4])
    assert estimator.state_dict() == {"false_positives": [1, 1], "false_negatives": [0, 0], "binary": True}


def test_one_graded_reward_ends_the_estimate_and_is_said_once() -> None:
    estimator = repeated(5, 20, 2, 20)

    def see(observed: float) -> None:
        estimator.observe(["0"], torch.tensor([observed]), torch.tensor([1.0]), identity)

    with pytest.warns(UserWarning, match="1 of the rewards observed in a step are neither 0 nor 1"):
        see(0.7)
    with warnings.catch_warnings(action="error"):
        see(2.5)
        see(1.0)
    assert estimator.rates() == NO_RATES  # what was counted before counts no more
    assert estimator.figures()["noise/trusted"] == 0
    resumed = RateEstimator(EXAMPLES, 1.0, seed=0)
    resumed.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
    resumed.observe(["0"], torch.tensor([1.0]), torch.tensor([1.0]), identity)
    assert resumed.figures()["noise/trusted"] == 0


@pytest.mark.parametrize(("p", "q"), [(0.3, 0.1), (0.05, 0.4), (0.0, 0.0)])
def test_the_intervals_hold_the_injected_rates(p: float, q: float) -> None:
    noise = load_config({"noise": {"kind": "asymmetric", "false_positive": p, "false_negative": q, "seed": 5}}).noise
    true = [float(i % 3 == 0) for i in range(1000)]
    observed: list[float] = make_noise(noise, 0)(true, IDS, [0] * 1000, [0] * 1000, [[]] * 1000)  # type: ignore[assignment]
    figures = counted(observed, true).figures()
    for name, rate in (("false_positive", p), ("false_negative", q)):
        assert figures[f"noise/{name}_low"] <= rate <= figures[f"noise/{name}_high"]
        assert figures[f"noise/{name}"] == pytest.approx(rate, abs=0.05)


def test_persistent_counts_go_on_where_they_were() -> None:
    one, other = repeated(3, 29, 12, 49), RateEstimator(EXAMPLES, 1.0, seed=0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.figures() == one.figures()
    other.observe(["0"], torch.tensor([1.0]), torch.tensor([0.0]), identity)
    assert other.false_positives.wrong == 4


def test_counts_of_all_processes_are_added() -> None:
    estimator = RateEstimator(EXAMPLES, 1.0, seed=0)

    def two_processes(counts: Tensor) -> Tensor:
        return 2 * counts

    estimator.observe(["0", "1"], torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), two_processes)
    assert estimator.state_dict() == {"false_positives": [2, 2], "false_negatives": [0, 2], "binary": True}

    def another_saw_a_grade(counts: Tensor) -> Tensor:
        return counts + (torch.arange(len(counts)) == 4)

    with pytest.warns(UserWarning, match="1 of the rewards"):  # or this process would go on correcting alone
        estimator.observe(["0"], torch.tensor([1.0]), torch.tensor([1.0]), another_saw_a_grade)
    assert estimator.state_dict() == {"false_positives": [0, 0], "false_negatives": [0, 0], "binary": False}


# What a correction may use


@pytest.mark.parametrize(("wrong", "right"), [(0, 0), (19, 500), (500, 19)])
def test_nothing_is_corrected_while_one_rate_is_but_a_guess(wrong: int, right: int) -> None:
    estimator = repeated(0, wrong, 0, right)
    assert estimator.rates() == NO_RATES
    assert estimator.figures()["noise/correction"] == 1


def test_twenty_of_each_kind_are_enough() -> None:
    assert repeated(5, 20, 2, 20).rates() == pytest.approx((5.5 / 21, 2.5 / 21))


@pytest.mark.parametrize(("false_positives", "false_negatives"), [(50, 50), (90, 90), (100, 0)])
def test_a_correction_never_multiplies_by_more_than_five(false_positives: int, false_negatives: int) -> None:
    estimator = repeated(false_positives, 100, false_negatives, 100)
    p, q = estimator.rates()
    assert p + q == pytest.approx(0.8)
    assert p / q == pytest.approx((false_positives + 0.5) / (false_negatives + 0.5))
    assert estimator.figures()["noise/correction"] == pytest.approx(5)


# In a run


def test_trusted_prompts_of_a_task_without_truth_are_an_input_error(tmp_path: Path) -> None:
    task = Parity()
    task.knows_truth = False  # type: ignore[attr-defined]
    config = run_config(tmp_path / "run", "reward.trusted=0.5", "reward.function=examples.no_such:function")
    with pytest.raises(InputError, match=r"reward\.trusted = 0\.5 needs true rewards, which the task parity"):
        Trainer(config, task=task, reward=lambda prompts, completions, **_: [0.0] * len(prompts))


@pytest.mark.parametrize(
    ("setting", "rates", "mean"),
    [
        ("reward.correction=backward", {"false_positive": 0.1, "false_negative": 0.3}, lambda r: (r - 0.1) / 0.6),
        ("reward.correction=forward", {"false_negative": 0.3}, lambda r: r - 0.7),
        ("advantage.law.functional=denoised", {"false_positive": 0.1, "false_negative": 0.3}, lambda r: r),
    ],
)
def test_known_rates_are_used_from_the_first_step_on_and_nobody_is_trusted(
    tmp_path: Path, setting: str, rates: dict[str, float], mean: Callable[[float], float]
) -> None:
    known = f"reward.rates={json.dumps(rates)}"
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=ppo", setting, known), task=Parity())
    rollout, _ = trainer.collect()
    _, figures = trainer.estimate(rollout)
    trainer.close()
    assert trainer.rates.rates() == (rates.get("false_positive", 0), 0.3)
    assert figures["noise/correction"] == pytest.approx(1 / (1 - sum(rates.values())))
    assert "noise/trusted" not in figures
    # Undiscounted, so each token's return is that of its response.
    weights_B = rollout.mask_BT.sum(dim=-1) / rollout.mask_BT.sum()
    expected = (weights_B * torch.tensor([mean(r) for r in rollout.observed_B.tolist()])).sum()
    assert figures["critic/return_mean"] == pytest.approx(float(expected), abs=1e-5)


def test_known_rates_need_no_truth_and_survive_a_resume(tmp_path: Path) -> None:
    task = Parity()
    task.knows_truth = False  # type: ignore[attr-defined]

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        return [float(len(ids) % 2) for ids in completion_ids]

    known = ("reward.correction=backward", "reward.rates={false_positive: 0.2, false_negative: 0.1}")
    settings = ("algorithm=ppo", "reward.function=examples.no_such:function", "checkpoint.every=1", *known)
    Trainer(run_config(tmp_path / "run", *settings, "steps=1"), task=task, reward=reward).train()
    resumed = Trainer(run_config(tmp_path / "run", *settings, "steps=2"), task=task, reward=reward, resume=True)
    assert resumed.step == 1
    assert resumed.train_step()["noise/correction"] == pytest.approx(1 / 0.7)
    resumed.close()


def test_estimating_changes_nothing_but_the_log(tmp_path: Path) -> None:
    rows = {}
    for trusted in (0, 1):
        folder = tmp_path / str(trusted)
        noise = ("noise.kind=flip", "noise.rate=0.3", f"reward.trusted={trusted}")
        Trainer(run_config(folder, "algorithm=ppo", *noise), task=Parity()).train()
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        rows[trusted] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]
    estimated = [{k: v for k, v in row.items() if not k.startswith("noise/")} for row in rows[1]]
    assert estimated == rows[0]
    assert [row["noise/trusted"] for row in rows[1] if "noise/trusted" in row] == [6, 12]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["reward.correction=backward"], "reward.correction = backward needs rates: set reward.trusted, to 0.05 say"),
        (["advantage.law.functional=denoised"], "advantage.law.functional = denoised needs rates: set reward.trusted"),
        (["reward.rates.false_negative=0.2"], "reward.rates are used by nothing: set reward.correction"),
        (
            ["reward.correction=backward", "reward.trusted=0.1", "reward.mix=[{function: task, weight: 2}]"],
            "reward.correction = backward takes rewards that are 0 or 1, and reward.mix weighs and adds",
        ),
        (
            ["advantage.law.functional=denoised", "reward.trusted=0.1", "algorithm=grpo"],
            "advantage.law.functional = denoised trims a critic's law, but algorithm = grpo has no critic",
        ),
        (
            ["reward.correction=backward", "reward.rates.false_negative=0.2"],
            "reward.correction = backward needs reward.rates.false_positive too: set it, to 0",
        ),
        (
            ["reward.correction=forward", "reward.rates.false_positive=0.2"],
            "reward.correction = forward needs reward.rates.false_negative too",
        ),
        (
            ["reward.correction=backward", "reward.rates={false_positive: 0.4, false_negative: 0.6}"],
            "reward.rates.false_positive + reward.rates.false_negative = 1 leaves no signal",
        ),
        (
            ["algorithm=ppo_corrected", "reward.rates={false_positive: 0.1, false_negative: 0.2}"],
            "reward.trusted = 0.05 would estimate them: set reward.trusted to 0, or drop reward.rates",
        ),
        (["reward.rates.false_negative=1"], "reward.rates.false_negative = 1 is not valid"),
        (
            ["reward.trusted=0.1", "reward.correction=backward", "advantage.law.functional=denoised"],
            "both take the noise out",
        ),
        (
            ["reward.trusted=0.1", "advantage.law.functional=denoised", "reward.norm=group", "reward.clip=1"],
            "which reward.norm = group and reward.clip = 1.0 would change",
        ),
        (
            ["reward.trusted=0.1", "advantage.law.functional=denoised", "actor.kl.place=reward", "actor.kl.coef=0.1"],
            "which actor.kl.place = reward would change",
        ),
        (
            [
                "algorithm=dvpo_paper",
                "reward.correction=forward",
                "critic.adaptive_risk=true",
                "reward.rates.false_negative=0.2",
            ],
            "needs reward.rates.false_positive too: set it, to 0 if there are none",
        ),
        (["reward.overlong=65"], "reward.overlong = 65 exceeds sampling.max_completion_length = 64: lower it"),
    ],
)
def test_settings_that_denoise_from_nothing_or_twice_or_punish_all_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, settings)
    assert words in str(caught.value)
