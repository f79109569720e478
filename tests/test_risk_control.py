"""alpha, beta and the terms' weights follow the rates of false rewards that were counted."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.risk_control import matched_to_noise, risk_figures
from dvpo.shaping import NO_RATES, Rates
from dvpo.trainer import Trainer
from runs import Parity, run_config
from test_trainer import farthest, rows, trained, weights

ADAPTIVE = ("algorithm=dvpo_paper", "critic.adaptive_risk=true", "reward.trusted=1")
NOISY = ("noise.kind=asymmetric", "noise.false_positive=0.3", "noise.false_negative=0.1")
MANY = ("sampling.prompts_per_step=16", "sampling.samples_per_prompt=4", "steps=3")


def settings(*overrides: str) -> Config:
    return load_config(None, [*ADAPTIVE, "critic.alpha=0.2", "critic.beta=0.3", *overrides])


def test_tails_and_weights_by_hand():
    # p = .25, q = .15: alpha_t = .15, beta_t = .25; weights .1 * (.25 + .15) / (.2 + .3) = .08, consistency as it was.
    critic = matched_to_noise(settings(), Rates(false_positive=0.25, false_negative=0.15)).critic
    assert (critic.alpha, critic.beta) == (0.15, 0.25)
    expected = dict.fromkeys(("risk", "cvar", "gain", "shift", "shape", "curvature"), 0.08) | {"consistency": 0.1}
    assert asdict(critic.weights) == pytest.approx(expected)
    figures = risk_figures(settings(), Rates(0.25, 0.15))
    assert figures == pytest.approx({"critic/alpha": 0.15, "critic/beta": 0.25, "critic/term_scale": 0.8})


def test_no_noise_switches_the_tail_terms_off_and_much_noise_keeps_the_weights_as_configured():
    config = settings("critic.num_quantiles=50")
    quiet = matched_to_noise(config, Rates(1e-9, 0.0)).critic
    assert (quiet.alpha, quiet.beta) == (1 / 50, 1 / 50)  # a tail has one atom at least
    assert quiet.weights.cvar == pytest.approx(0, abs=1e-8)
    loud = matched_to_noise(config, Rates(0.4, 0.4)).critic
    assert (loud.alpha, loud.beta) == (0.4, 0.4)
    assert loud.weights == config.critic.weights


def test_until_enough_is_counted_and_where_it_is_off_all_stays_as_configured():
    assert matched_to_noise(settings(), NO_RATES) == settings()
    as_configured = {"critic/alpha": 0.2, "critic/beta": 0.3, "critic/term_scale": 1.0}
    assert risk_figures(settings(), NO_RATES) == as_configured  # a scale of 0 would be that of known rates of 0
    off = settings("critic.adaptive_risk=false")
    assert matched_to_noise(off, Rates(0.3, 0.3)) is off
    assert risk_figures(off, Rates(0.3, 0.3)) == {}


def test_who_knows_that_there_is_no_noise_pays_nothing_for_the_terms():
    known = settings("reward.rates.false_positive=0", "reward.rates.false_negative=0", "reward.trusted=0")
    weights = matched_to_noise(known, NO_RATES).critic.weights
    assert {name for name, weight in asdict(weights).items() if weight > 1e-9} == {"consistency"}
    assert risk_figures(known, NO_RATES)["critic/term_scale"] == 0


def test_nothing_else_of_the_config_moves():
    config = settings()
    moved = matched_to_noise(config, Rates(0.3, 0.1))
    matched = {name: getattr(config.critic, name) for name in ("alpha", "beta", "weights")}
    assert replace(moved, critic=config.critic) == config
    assert replace(moved.critic, **matched) == config.critic


# In a run


def critic_rows(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in rows(trainer) if "critic/loss" in row]


def test_a_run_follows_what_it_has_counted_and_logs_it(tmp_path: Path):
    trainer = trained(tmp_path / "run", *ADAPTIVE, *NOISY, *MANY)
    last = critic_rows(trainer)[-1]
    p, q = trainer.rates.rates()
    assert 0.15 < p < 0.45
    assert last["critic/alpha"] == pytest.approx(max(q, 1 / 8))
    assert last["critic/beta"] == pytest.approx(p)
    scale = last["critic/term_scale"]
    assert scale == 1  # p + q is above .1 + .1
    terms = sum(0.1 * last[f"critic/{term}"] for term in asdict(trainer.config.critic.weights))
    assert last["critic/loss"] == pytest.approx(last["critic/qr"] + terms, rel=1e-4)


def test_on_clean_rewards_the_loss_is_left_with_quantiles_and_consistency(tmp_path: Path):
    last = critic_rows(trained(tmp_path / "run", *ADAPTIVE, *MANY))[-1]
    assert last["critic/term_scale"] < 0.1
    tails = sum(0.1 * last[f"critic/{term}"] for term in ("risk", "cvar", "gain", "shift", "shape", "curvature"))
    expected = last["critic/qr"] + 0.1 * last["critic/consistency"] + last["critic/term_scale"] * tails
    assert last["critic/loss"] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_goes_on_with_the_counts_it_had_bit_for_bit(tmp_path: Path):
    given = (*ADAPTIVE, *NOISY, *MANY)
    whole = trained(tmp_path / "whole", *given)
    half = Trainer(run_config(tmp_path / "half", *given), task=Parity())
    for _ in range(2):
        half.train_step()
    half.save()
    half.close()
    resumed = Trainer(run_config(tmp_path / "half", *given), task=Parity(), resume=True)
    resumed.train()
    assert farthest(weights(resumed), weights(whole)) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (ADAPTIVE[:2], "critic.adaptive_risk = true needs rates: set reward.trusted"),
        (
            [*ADAPTIVE[1:], "algorithm=dvpo"],
            "critic.adaptive_risk = true moves the tail terms, whose weights are 0 with algorithm = dvpo: set",
        ),
        (
            [*ADAPTIVE[1:], "algorithm=ppo"],
            "critic.adaptive_risk = true moves the tail terms, which algorithm = ppo does not have: set it to false",
        ),
    ],
)
def test_settings_that_follow_nothing_or_move_nothing_are_refused(given: list[str], words: str):
    with pytest.raises(InputError, match=words):
        load_config(None, given)
