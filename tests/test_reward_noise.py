"""The noise on what the starting policy really writes: benchmarks/reward_noise.py, made again smaller."""

import json
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import reward_noise

MODELS = ("reward_model", "response_reward_model")


def test_the_committed_72_percent_are_within_one_point_on_10000_pairs_of_the_starting_policy() -> None:
    rows = json.loads(reward_noise.RESULT.read_text())["rows"]
    for kind in MODELS:
        row = rows[f"{kind}: pairs in order"]
        assert row["count"] >= 10_000
        assert abs(row["measured"] - 0.72) <= 0.01


def test_every_committed_rate_agrees_with_what_is_promised() -> None:
    # 99.9% each, exact: right rates would all agree for 98.7% of the seeds.
    for name, row in json.loads(reward_noise.RESULT.read_text())["rows"].items():
        hits = round(row["measured"] * row["count"])
        assert binomtest(hits, row["count"], row["promised"]).pvalue > 1e-3, name


@pytest.mark.slow
def test_the_rates_hold_on_fresh_answers_and_other_draws() -> None:
    rows = reward_noise.measure(reward_noise.Answers(2000, seed=302), seed=302)
    assert rows["reward_model: pairs in order"]["count"] > 700
    for name, row in rows.items():
        interval = binomtest(round(row["measured"] * row["count"]), row["count"]).proportion_ci(0.999, method="exact")
        assert interval.low <= row["promised"] <= interval.high, name


@pytest.mark.slow
def test_pairs_across_questions_or_of_the_same_answer_would_be_noticed() -> None:
    """A reward model with one draw a question orders every pair rightly; the measure sees it."""
    answers = reward_noise.Answers(300, seed=303)
    for kind in ("gaussian", "affine"):
        settings = {"sd": 1.213} if kind == "gaussian" else {"offset_sd": 1.213, "scale_sd": 0.0}
        ordered = answers.pairs_in_order(answers.observed(303, kind=kind, **settings))
        assert (ordered.mean() == 1.0) == (kind == "affine")
