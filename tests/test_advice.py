"""What follows from findings: settings that load, rates that end where they belong, and nothing where nothing helps."""

from dataclasses import replace

import numpy as np
import pytest

from dvpo.advice import MOST_SAMPLES, advise, kept, settings
from dvpo.config import Config
from dvpo.diagnosis import Findings, Sheet, find
from dvpo.loading import load_config
from dvpo.nested import merge

CONFIG = load_config({"sampling": {"samples_per_prompt": 2}})  # no more than any sheet here has


def sheet(observed_RPK: np.ndarray, true_PK: np.ndarray, **more) -> Sheet:
    shape = observed_RPK.shape[1:]
    fields = {
        "others_PK": {},
        "lengths_PK": np.full(shape, 10.0),
        "truncated_PK": np.zeros(shape, dtype=bool),
        "faulty_RPK": np.zeros(observed_RPK.shape, dtype=bool),
        **more,
    }
    return Sheet(observed_RPK, true_PK, **fields)


def verdicts(wrong_of_wrong: int, wrong_of_right: int, each: int = 100) -> Findings:
    """`each` prompts with a wrong and a right answer; so many of each kind are taken for the other."""
    true = np.tile([0.0, 1.0], (each, 1))
    observed = true.copy()
    observed[:wrong_of_wrong, 0] = 1
    observed[each - wrong_of_right :, 1] = 0
    return find(sheet(np.stack([observed, observed]), true))


def chosen(findings: Findings, config: Config = CONFIG) -> dict:
    """The settings, which must load."""
    found = settings(advise(findings, config))
    load_config(found)
    return found


def test_false_verdicts_set_the_baseline_correction_and_samples():
    found = chosen(verdicts(10, 30))
    # Jeffreys' means 10.5/101 and 30.5/101 leave f = 1 - 41/101 = .594, samples = ceil(2 / f^2) = 6.
    assert found["algorithm"] == "ppo"
    assert "critic" not in found  # ppo has no quantiles
    assert found["reward"]["correction"] == "backward"
    assert found["reward"]["rates"] == {"false_positive": 0.104, "false_negative": 0.302}
    assert found["sampling"]["samples_per_prompt"] == 6


def test_a_run_that_estimates_its_rates_goes_on_to_and_a_mix_is_not_corrected():
    trusted = load_config({"reward": {"trusted": 0.1}})
    found = settings(advise(verdicts(10, 30), trusted))
    assert found["reward"] == {"correction": "backward"}
    mix = load_config({"reward": {"mix": [{"function": "task"}]}})
    assert "reward" not in chosen(verdicts(10, 30), mix)


@pytest.mark.parametrize("algorithm", ["ppo_corrected", "grpo_corrected"])
def test_what_a_row_trusts_by_default_is_replaced_by_rates_and_a_norm_is_switched_off(algorithm: str):
    own = {"algorithm": algorithm, "reward": {"trusted": 0.05, "norm": "batch"}}  # 0.05 is the row's default
    found = chosen(verdicts(10, 30), load_config(own))
    assert found["reward"]["rates"] == {"false_positive": 0.104, "false_negative": 0.302}
    merged = load_config(merge(own, found))
    assert (merged.algorithm, merged.reward.trusted, merged.reward.norm) == ("ppo", 0, "none")
    assert merged.reward.correction == "backward"  # held already, but by the row that goes


def test_settings_that_the_users_config_does_not_go_with_are_said():
    law = load_config({"algorithm": "dvpo_plain", "advantage": {"law": {"functional": "tv_worst_case"}}})
    last = advise(verdicts(0, 0), law)[-1].sentence  # advises ppo, which has no law
    assert "dvpo train would refuse it with these settings: " in last
    assert "advantage.law.functional = tv_worst_case reads a law of returns" in last
    assert not any("refuse" in one.sentence for one in advise(verdicts(0, 0), CONFIG))


def test_what_the_config_has_already_is_no_setting():
    assert chosen(verdicts(0, 0)) == {"algorithm": "ppo"}
    assert chosen(verdicts(0, 0), load_config({"algorithm": "ppo", "sampling": {"samples_per_prompt": 2}})) == {}


def test_kappa_is_for_rows_with_quantiles_and_rewards_of_another_spread():
    scores = np.tile(np.linspace(0, 4, 40), (1, 8, 1))  # scored once: no row is advised
    unknown = np.full((8, 40), np.nan)
    # Spread from 5% to 95%: 3.6 of 4.
    assert chosen(find(sheet(scores, unknown)))["critic"] == {"kappa": 0.36}
    assert "critic" not in chosen(find(sheet(scores, unknown)), load_config({"algorithm": "ppo"}))
    assert not any("kappa" in one.sentence for one in advise(find(sheet(scores.round() % 2, unknown)), CONFIG))


@pytest.mark.parametrize(("own", "asked"), [(2, ""), (4, "--samples 8,"), (16, "--samples 16,")])
def test_few_samples_do_not_show_that_fewer_than_the_configs_would_do(own: int, asked: str):
    config = load_config({"algorithm": "ppo", "sampling": {"samples_per_prompt": own}})
    last = advise(verdicts(0, 0), config)[-1]
    assert not last.settings
    said = f"Ask again with {asked} because only 2 answers a prompt were sampled" if asked else "Sample 2 answers"
    assert last.sentence.startswith(said)


def test_no_certain_false_verdict_means_no_correction_and_the_plain_baseline():
    findings = verdicts(0, 0)
    assert kept(findings) == 1
    found = chosen(findings)
    assert found["algorithm"] == "ppo"
    assert "reward" not in found


def test_hopeless_rates_and_silent_prompts_get_a_sentence_and_no_algorithm():
    advice = advise(verdicts(45, 50), CONFIG)
    assert "Mend the reward before any training" in advice[0].sentence
    found = chosen(verdicts(45, 50))
    assert "algorithm" not in found
    assert found["sampling"]["samples_per_prompt"] <= MOST_SAMPLES
    silent = find(sheet(np.ones((2, 30, 4)), np.full((30, 4), np.nan)))
    assert "Take other prompts" in advise(silent, CONFIG)[-1].sentence


def test_rates_of_a_few_answers_are_not_acted_on():
    advice = advise(verdicts(3, 9, each=15), CONFIG)
    assert any("more --prompts" in one.sentence for one in advice)
    assert "reward" not in settings(advice)


@pytest.mark.parametrize(("low", "high", "noise"), [(-1.0, 1.0, 0.0), (0.0, 1.0, 0.5)])
def test_a_truth_that_is_known_is_not_asked_for_where_scores_are_not_0_and_1(low: float, high: float, noise: float):
    true = np.tile([low, high], (30, 1))
    observed = true + noise * np.random.default_rng(0).normal(size=(2, 30, 2))
    sentences = [one.sentence for one in advise(find(sheet(observed, true)), CONFIG)]
    assert any(text.startswith("Give a reward and a truth of 0 and 1") for text in sentences)
    assert not any("task.truth" in text or "--prompts" in text for text in sentences)


def test_without_the_truth_scores_that_scatter_want_a_critic_and_outliers_a_rank():
    rng = np.random.default_rng(0)
    unknown = np.full((32, 4), np.nan)
    scattered = find(sheet(rng.normal(size=(2, 32, 4)), unknown))
    assert chosen(scattered)["algorithm"] == "ppo"  # a critic; a law of scatter is described by its mean
    assert any("task.truth" in one.sentence for one in advise(scattered, CONFIG))
    heavy = rng.normal(size=(2, 32, 4))
    heavy[0, 0, 0] = 1000.0
    found = chosen(find(sheet(heavy, unknown)), load_config({"algorithm": "ppo"}))
    assert (found["algorithm"], found["advantage"]) == ("dvpo", {"lam": 1.0})


@pytest.mark.parametrize("samples", [1, 8])
def test_of_a_groups_norm_is_told_only_who_has_groups(samples: int):
    rewards = np.random.default_rng(0).normal(size=(2, 32, 4))
    rewards[0, 0, 0] = 1000.0
    config = load_config({"algorithm": "ppo", "sampling": {"samples_per_prompt": samples}})
    bounded = [one.sentence for one in advise(find(sheet(rewards, np.full((32, 4), np.nan))), config)]
    assert ("reward.norm=group" in " ".join(bounded)) == (samples > 1)


def test_faults_cuts_and_missing_scores_are_named_first():
    observed = np.random.default_rng(0).normal(size=(1, 10, 4))
    observed[0, :2] = np.nan  # 20% missing, half of it by a fault
    faulty = np.zeros(observed.shape, dtype=bool)
    faulty[0, 0] = True
    cut = np.zeros((10, 4), dtype=bool)
    cut[:5] = True
    findings = find(sheet(observed, np.full((10, 4), np.nan), faulty_RPK=faulty, truncated_PK=cut, fault="timeout: x"))
    advice = advise(findings, CONFIG)
    assert "10.0% of scores were lost to faults, the first of them timeout: x" in advice[0].sentence
    assert "10.0% have none by the reward's own word" in advice[1].sentence
    assert "50.0% of the answers were cut" in advice[2].sentence
    found = chosen(findings)
    assert found["reward"] == {"retries": 2}
    assert found["sampling"]["max_completion_length"] == 2 * CONFIG.sampling.max_completion_length
    assert found["sampling"]["samples_per_prompt"] == 3  # two tell continuous scores apart, 20% of them are missing


def test_a_reward_that_fails_on_every_answer_is_all_that_is_said():
    observed = np.full((2, 10, 4), np.nan)
    faulty = np.ones(observed.shape, dtype=bool)
    fault = "TypeError: string indices must be integers (my_rewards.py:12)"
    findings = find(sheet(observed, np.zeros((10, 4)), faulty_RPK=faulty, fault=fault))
    [only] = advise(findings, CONFIG)
    assert only.sentence == f"Your function fails on every answer: {fault}; fix it first."
    assert not only.settings


def test_where_nothing_has_a_score_nothing_else_is_said():
    observed, right = np.full((2, 10, 4), np.nan), np.tile([0.0, 1.0], (10, 2))
    [only] = advise(find(sheet(observed, right)), CONFIG)
    assert "since 100.0% have none by the reward's own word: nothing is left to learn from." in only.sentence
    faulty = np.zeros(observed.shape, dtype=bool)
    faulty[:, :2] = True
    lost, unsaid = advise(find(sheet(observed, right, faulty_RPK=faulty, fault="timeout: x")), CONFIG)
    assert "20.0% of scores were lost to faults" in lost.sentence
    assert "since 80.0% have none" in unsaid.sentence


def test_signal_is_said_to_be_the_truths_or_the_rewards_as_it_was_measured():
    observed = np.tile([0.0, 1.0, 1.0], (2, 10, 1))
    observed[0, :, 0] = np.nan
    said = [one.sentence for one in advise(find(sheet(observed, np.tile([0.0, 1.0, 1.0], (10, 1)))), CONFIG)]
    assert any("because no scored answer was truly wrong and 20 scored answers were truly right" in s for s in said)
    assert any("of the prompts differ by the truth" in s for s in said)
    assert not any("differ in their reward" in s for s in said)
    observed[0, :, 0] = 0.0
    unknown, same = (find(sheet(observed, np.full((10, 3), truth))) for truth in (np.nan, 1.0))
    assert "of the prompts differ in their reward" in advise(unknown, CONFIG)[-1].sentence
    assert "no prompt's answers differ by the truth" in advise(same, CONFIG)[-1].sentence


@pytest.mark.parametrize(
    ("lost", "fault", "retries"),
    [
        ([(0, 0)], "KeyError: 'a' (my_rewards.py:3)", True),  # in one of two scorings: it may pass
        ([(0, 0), (1, 0)], "KeyError: 'a' (my_rewards.py:3)", False),
        ([(0, 0), (1, 1)], "KeyError: 'a' (my_rewards.py:3)", True),
        ([(0, 0)], "non_finite: returned inf", False),  # not tried again, whatever reward.retries says
    ],
)
def test_retries_are_for_faults_that_may_pass(lost: list[tuple[int, int]], fault: str, retries: bool):
    observed = np.random.default_rng(0).normal(size=(2, 10, 4))
    faulty = np.zeros(observed.shape, dtype=bool)
    for scoring, prompt in lost:
        observed[scoring, prompt, 0], faulty[scoring, prompt, 0] = np.nan, True
    findings = find(sheet(observed, np.full((10, 4), np.nan), faulty_RPK=faulty, fault=fault))
    first = advise(findings, CONFIG)[0]
    assert fault in first.sentence
    assert ("tried again" in first.sentence, bool(first.settings)) == (retries, retries)


def test_fewer_samples_are_weighed_against_the_signal_they_lose():
    true = np.zeros((10, 8))
    true[:, :4] = 1
    same = find(sheet(np.stack([true, true]), true, judged_by_truth=True))
    sentence = advise(same, CONFIG)[-1].sentence
    # Of 4 right and 4 wrong, k answers are alike with probability 2 C(4, k) / C(8, k): .143 at k = 3, .029 at k = 4.
    assert "with 4 the answers to 97.1% of the prompts differ" in sentence
    assert ", with 8 100.0%: 50% fewer samples for 2.9 points less signal" in sentence


def test_prompts_without_signal_are_replaced_unless_they_are_already():
    true = np.zeros((20, 4))
    true[:5, 0] = 1
    findings = replace(find(sheet(np.stack([true, true]), true)), false_positive=None, false_negative=None)
    assert chosen(findings)["sampling"]["resample_rounds"] == 3
    done = load_config({"sampling": {"resample_rounds": 1, "samples_per_prompt": 2}})
    assert "resample_rounds" not in settings(advise(findings, done))["sampling"]


@pytest.mark.parametrize("wrong", [0, 5, 20, 40])
def test_every_sentence_has_its_reason(wrong: int):
    for one in advise(verdicts(wrong, wrong), CONFIG):
        assert any(word in one.sentence for word in (" because ", " since ")), one.sentence
