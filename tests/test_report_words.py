"""What a report says in words: what was reached, by whose judgement, and what looks wrong."""

from dataclasses import replace

import pytest

from dvpo.report_data import Place, Run, Series
from dvpo.report_panels import learning_panel
from dvpo.report_summary import summary_table
from dvpo.report_words import sentences


def ended(name: str, seed: int, *accuracies: float) -> Run:
    rows = [{"step": step, "eval/id/accuracy": value} for step, value in enumerate(accuracies)]
    return Run(name, seed, None, {}, evaluations=rows)


def test_the_verdict_of_single_seeds_claims_nothing():
    place = Place("", [Series("dvpo", [ended("dvpo", 0, 0.5, 0.8)]), Series("ppo", [ended("ppo", 0, 0.5, 0.7)])])
    (verdict,) = [s.text for s in sentences(place, "ppo") if s.kind == "verdict"]
    assert verdict.startswith("dvpo against ppo: it ends 10.0 points above it in distribution.")
    assert "no evidence" in verdict


def test_the_verdict_of_several_seeds_is_the_paired_difference():
    dvpo = Series("dvpo", [ended("dvpo", seed, 0.5, 0.8) for seed in (1, 2)])
    ppo = Series("ppo", [ended("ppo", seed, 0.5, 0.7 + 0.02 * seed) for seed in (2, 1, 3)])
    (verdict,) = [s.text for s in sentences(Place("", [dvpo, ppo]), "ppo") if s.kind == "verdict"]
    # Differences 8 and 6 points: mean 7, sd sqrt 2, t(1) = 12.706: 7 -+ 12.706.
    assert "7.0 points above it in distribution (95% interval -5.7 to +19.7, p = 0.500)" in verdict
    assert "Paired by 2 seeds" in verdict


def test_without_a_truth_accuracy_is_said_to_be_by_the_reward_and_what_did_not_move_stayed():
    own = replace(ended("dvpo", 0, 0.0, 0.0), settings={"task.name": "files", "task.truth": None})
    (said,) = [s.text for s in sentences(Place("", [Series("dvpo", [own])]), "ppo")]
    by_reward = "accuracy by your reward (no truth was named) on held-out prompts"
    assert said == f"dvpo: {by_reward} stayed at 0.0% in distribution."
    judged = replace(own, settings={"task.name": "files", "task.truth": "my:truth"})
    parts = [{"name": "math", "truth": None}, {"name": "files", "truth": None}]
    mixed = replace(own, settings={"task.name": "mix", "task.mix": parts}, steps=[{"step": 1, "reward/true": 1.0}])
    blind = replace(own, settings={"task.name": "my:task"}, steps=[{"step": 1, "reward/observed": 1.0}])
    titles = []
    for run in (own, judged, blind, mixed):
        place = Place("", [Series("dvpo", [replace(run, evaluations=ended("dvpo", 0, 0.5, 0.8).evaluations)])])
        texts = [sentences(place, "ppo")[0].text, summary_table(place).note, learning_panel(place).charts[0].title]
        titles.append(["by your reward (no truth was named)" in text for text in texts])
    assert titles == [[True] * 3, [False] * 3, [True] * 3, [True] * 3]


@pytest.mark.parametrize(
    ("wrong", "missing", "said"),
    [
        ((0.0, 0.0), 0.0, "The observed rewards were the true ones."),
        ((0.0, 0.0), 0.292, "The observed rewards were the true ones where there was one."),
        ((0.18, 0.19), 0.292, "18.5% of the observed rewards were not the true ones."),
        ((0.0, 0.375), 0.0, "Observed rewards that were not the true ones: 0.0% in one; 37.5% in other."),
    ],
)
def test_untrue_rewards_are_told_run_by_run_where_they_differ_and_missing_ones_are_not_called_true(
    wrong: tuple[float, float], missing: float, said: str
):
    steps = [[{"step": 1, "reward/accuracy": 1 - share, "reward/missing": missing}] for share in wrong]
    series = [Series(name, [Run(name, 0, None, {}, steps=s)]) for name, s in zip(("one", "other"), steps, strict=True)]
    assert said in [sentence.text for sentence in sentences(Place("", series), "ppo")]


def test_an_end_far_below_the_peak_is_warned_of():
    place = Place("", [Series("ppo", [ended("ppo", 0, 0.5, 0.8, 0.6)])])
    (warning,) = [s.text for s in sentences(place, "ppo") if s.kind == "warning"]
    assert warning == "ppo, seed 0: it ends 20 points below its highest accuracy in distribution."


@pytest.mark.parametrize(("missing", "said"), [(1.0, True), (0.9, False)])
def test_a_run_whose_responses_all_lack_a_reward_is_said_to_have_learned_nothing(missing: float, said: bool):
    run = replace(ended("ppo", 0, 0.5, 0.5), steps=[{"step": step, "reward/missing": missing} for step in range(1, 9)])
    warnings = [s.text for s in sentences(Place("", [Series("ppo", [run])]), "ppo") if s.kind == "warning"]
    assert any("nothing was learned" in text for text in warnings) is said


def test_held_out_answers_without_a_reward_at_the_end_are_counted_in_a_warning():
    rows = [{"step": step, "eval/id/accuracy": 1.0, "eval/id/unknown": float(5 - step)} for step in (0, 3)]
    run = Run("dvpo", 0, None, {}, evaluations=rows)
    warnings = [s.text for s in sentences(Place("", [Series("dvpo", [run])]), "ppo") if s.kind == "warning"]
    assert [text.partition(" and count")[0] for text in warnings] == [
        f"{run.label}: 2 held-out answers in distribution had no reward at the end"
    ]
