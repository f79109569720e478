"""What the step makes of rewards: missing ones, cut responses, several turns, bad functions, the KL penalty."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo.errors import InputError, RunStoppedError
from dvpo.sampling import Turn
from dvpo.tasks import Example, SingleTurn, Step
from dvpo.trainer import Trainer
from runs import LINEAR, Parity, Talk, farthest, rollout_of, rows, run_config, trained, weights

# KL


def test_kl_in_the_reward_takes_k1_from_the_reward_of_each_token(tmp_path: Path):
    """With lambda = gamma = 1 and V = 0 the advantage is the sum of the later rewards, less the KL of those tokens."""
    settings = ["algorithm=ppo", "advantage.lam=1", "advantage.whiten=false"]
    kl = ["actor.kl.coef=0.5", "actor.kl.place=reward"]
    plain = Trainer(run_config(tmp_path / "plain", *settings), task=Parity())
    penal = Trainer(run_config(tmp_path / "penal", *settings, *kl), task=Parity())
    with torch.no_grad():  # another reference than the policy, or every k1 would be 0
        next(penal.reference.model.parameters()).add_(0.05 * torch.randn(264, 32))
    rollout = rollout_of(penal)
    reference_BT, _ = penal._token_figures(penal.reference, rollout)
    k1_BT = (rollout.sampler_logprobs_BT - reference_BT) * rollout.mask_BT
    with_kl, without = penal.estimate(rollout)[0], plain.estimate(rollout)[0]
    later_BT = k1_BT.flip(1).cumsum(dim=1).flip(1) * rollout.mask_BT
    assert later_BT.abs().max() > 0.01
    torch.testing.assert_close(with_kl.advantages_BT, without.advantages_BT - 0.5 * later_BT, atol=1e-5, rtol=1e-4)
    plain.close()
    penal.close()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_draws_the_log_probs_to_the_references_when_nothing_else_draws_them(
    tmp_path: Path, estimator: str
):
    kl = ["actor.kl.coef=1", f"actor.kl.estimator={estimator}"]
    trainer = Trainer(run_config(tmp_path / "run", "policy_optimiser.lr=3e-3", *kl), task=Parity())
    trainer.row = dataclasses.replace(trainer.row, actor_loss=lambda logprobs_K, *_: (0 * logprobs_K, 0 * logprobs_K))
    with torch.no_grad():
        next(trainer.reference.model.parameters()).add_(0.1 * torch.randn(264, 32))
    rollout = rollout_of(trainer)
    estimates, _ = trainer.estimate(rollout)
    distances = [trainer.update(rollout, estimates)["actor/kl_reference"] for _ in range(12)]
    assert distances[-1] < 0.2 * distances[0]
    trainer.close()


def test_without_a_coefficient_no_reference_model_is_loaded(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run"), task=Parity())
    assert trainer.reference is None
    trainer.close()


# Evaluations


def test_a_reward_that_fails_in_an_evaluation_is_logged_with_its_split_and_said(tmp_path: Path):
    class Unknown(Parity):
        knows_truth = False

        def true_reward(self, prompts: Any, *rest: Any, **columns: Any) -> list[None]:
            return [None] * len(prompts)

    def reward(completions: Any, answer: Any, **columns: Any) -> list[float]:
        return [1 / (not text.startswith("ood")) for text in answer]

    trainer = Trainer(run_config(tmp_path / "run"), task=Unknown(), reward=reward)
    with pytest.warns(UserWarning, match="evaluation at step 0: the reward failed 2 times.*ZeroDivisionError"):
        figures = trainer.evaluate()
    assert (figures["eval/id/items"], figures["eval/ood/items"]) == (2, 0)
    faults = rows(trainer, "faults")
    assert [(f["step"], f["split"], f["kind"], f["prompt_id"]) for f in faults] == [
        (0, "ood", "exception", "ood 0"),
        (0, "ood", "exception", "ood word 1"),
    ]
    trainer.close()


# An environment that raises


class Flaky(SingleTurn):
    """At every other example it raises."""

    def step(self, response: str) -> Step:
        if self.example.id[-1] in "02468":
            raise ConnectionError("the service is away")
        return super().step(response)

    def figures(self) -> dict[str, float]:
        return {"turns": 1.0}


class FlakyTask(Parity):
    def environment(self, example: Example) -> Flaky:
        return Flaky(example)


class Brief:
    """Every response is one byte and its end."""

    def sample(self, contexts: Any, *_: Any) -> list[Turn]:
        return [Turn([100, 1], [-5.5, -0.1], finished=True) for _ in contexts]


def flaky(folder: Path, *overrides: str, **given: Any) -> Trainer:
    """Half of 16 prompts raise, in each of 3 samples."""
    trainer = Trainer(run_config(folder, "sampling.prompts_per_step=16", *overrides), task=FlakyTask(), **given)
    trainer.collector.sampler, trainer.drawer = Brief(), lambda greedy: Brief()
    return trainer


@pytest.mark.parametrize("judged", [False, True])
def test_an_environment_that_raises_costs_its_samples_their_rewards_on_record_and_no_more(judged: bool, tmp_path: Path):
    trainer = flaky(tmp_path, reward=(lambda completions, **_: [1.0] * len(completions)) if judged else None)
    figures = trainer.train_step()
    assert (figures["reward/faults"], figures["reward/faults_exception"], figures["reward/missing"]) == (24, 24, 0.5)
    faults = [row for row in rows(trainer, "faults") if row["kind"] == "exception"]  # beside alarms
    assert {row["prompt_id"][-1] for row in faults} == set("02468")
    said = r"raised ConnectionError: the service is away \(test_trainer_rewards.py:\d+\)"
    assert re.search(said, faults[0]["message"])
    # Of two prompts each split has one that raises: it counts in no figure, and was not cut.
    with pytest.warns(UserWarning, match=rf"the reward failed 2 times.*: the environment of prompt id 0 {said}"):
        figures = trainer.evaluate()
    assert [figures[f"eval/id/{name}"] for name in ("items", "turns", "truncated")] == [1, 1, 0]
    trainer.close()


def test_too_many_environments_that_raise_end_the_run_as_rewards_do(tmp_path: Path):
    trainer = flaky(tmp_path, "reward.max_fault_share=0.4")
    with pytest.raises(RunStoppedError, match=r"24 of 48 responses lost their reward .* mend what failed, then go on"):
        trainer.train_step()
    trainer.close()


# Truncated responses and missing rewards


MISSING = [None, math.nan, None]


def test_a_masked_response_leaves_actor_critic_and_counts_as_if_it_had_never_been_drawn(tmp_path: Path):
    """The trained mask has no token of it, and the advantages of the others are whitened without it."""
    trainer = Trainer(run_config(tmp_path / "run"), task=Parity(MISSING))
    rollout = rollout_of(trainer)
    estimates, figures = trainer.estimate(rollout)
    assert rollout.rewarded_B.tolist() == [False] * 3 + [True] * 3
    assert not estimates.mask_BT[:3].any()
    assert (estimates.advantages_BT[:3] == 0).all()
    kept = estimates.advantages_BT[estimates.mask_BT]
    assert abs(float(kept.mean())) < 1e-5
    assert abs(float(kept.std(unbiased=False)) - 1) < 1e-4
    assert figures["reward/missing"] == 0.5
    trainer.close()


def test_a_bootstrapped_response_trains_with_a_last_delta_of_0_and_never_as_a_0(tmp_path: Path):
    settings = ["advantage.missing_reward=bootstrap", "advantage.whiten=false", "advantage.lam=0"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity(MISSING))
    with torch.no_grad():
        trainer.critic.heads.linear.bias.add_(0.7)  # V = .7 or so: as a 0 the last delta would be -.7
    rollout = rollout_of(trainer)
    estimates, figures = trainer.estimate(rollout)
    assert estimates.mask_BT[:3].any(dim=1).all()
    last_B = rollout.mask_BT.sum(dim=1) - 1
    assert (estimates.advantages_BT[torch.arange(3), last_B[:3]] == 0).all()
    assert figures["reward/observed"] == pytest.approx(float(rollout.true_B[3:].mean()))
    trainer.close()


@pytest.mark.parametrize("algorithm", ["dvpo", "ppo"])
def test_a_step_without_any_reward_changes_no_weight_and_breaks_nothing(tmp_path: Path, algorithm: str):
    settings = [f"algorithm={algorithm}", "policy_optimiser.weight_decay=0.1"]
    settings += ["advantage.target=mixture"] * (algorithm == "dvpo")
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity([None] * 6))
    before = weights(trainer)
    trainer.train_step()
    assert farthest(weights(trainer), before) == 0
    trainer.task = trainer.scorer.task = Parity()
    figures = trainer.train_step()
    assert farthest(weights(trainer), before) > 0
    assert all(math.isfinite(figures[key]) for key in ("actor/loss", "critic/loss", "actor/grad_norm"))
    trainer.close()


def test_what_truncation_masks_counts_in_no_figure_of_the_critic(tmp_path: Path):
    settings = ["advantage.truncation=mask", "algorithm=ppo", "reward.norm=batch"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity())
    rollout = rollout_of(trainer)
    _, figures = trainer.estimate(rollout)
    ended = rollout.observed_B[~rollout.truncated_B]
    assert 0 < len(ended) < len(rollout)
    lengths = rollout.mask_BT.sum(dim=1)[~rollout.truncated_B]
    returns = (ended - ended.mean()) / (ended.std(unbiased=False) + 1e-4)  # one reward, at the end: each token's return
    assert figures["critic/return_mean"] == pytest.approx(float((returns * lengths).sum() / lengths.sum()), abs=1e-5)
    trainer.close()


@pytest.mark.parametrize("rule", ["terminal", "bootstrap", "mask"])
def test_a_truncated_response_ends_at_0_at_the_critics_value_or_leaves(tmp_path: Path, rule: str):
    settings = [f"advantage.truncation={rule}", "advantage.whiten=false", "advantage.lam=0", "algorithm=ppo"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity())
    with torch.no_grad():
        trainer.critic.heads.linear.bias.add_(0.7)
    rollout = rollout_of(trainer)
    cut_B = rollout.truncated_B
    assert cut_B.any()
    assert not cut_B.all()
    estimates, _ = trainer.estimate(rollout)
    each = torch.arange(len(rollout))
    last_B = rollout.mask_BT.sum(dim=1) - 1
    rewards_B, values_B = rollout.rewards_BT[each, last_B], estimates.values_BTNM[each, last_B].squeeze()
    ends_B = trainer._values(rollout)[1].squeeze()
    expected_B = rewards_B - values_B + (ends_B * cut_B if rule == "bootstrap" else 0)
    if rule == "mask":
        assert not estimates.mask_BT[cut_B].any()
        expected_B = expected_B * ~cut_B
    torch.testing.assert_close(estimates.advantages_BT[each, last_B], expected_B)
    trainer.close()


@pytest.mark.parametrize(("rule", "share"), [("mask", 1.0), ("terminal", 0.5)])
def test_a_cut_response_that_leaves_the_step_is_no_signal(tmp_path: Path, rule: str, share: float):
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=grpo", f"advantage.truncation={rule}"), task=Parity())
    returns_B = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # three responses to each of two prompts
    cut_B = torch.tensor([True, False, False, False, False, False])
    rollout = dataclasses.replace(rollout_of(trainer), observed_B=returns_B, true_B=1 - returns_B, truncated_B=cut_B)
    figures = trainer.estimate(rollout)[1]
    trainer.close()
    assert (figures["reward/no_signal"], figures["reward/no_signal_true"]) == (share, share)


def test_several_turns_train_on_the_policys_words_only_whatever_the_micro_batch(tmp_path: Path):
    settings = [*LINEAR, "sampling.max_completion_length=24"]
    one = trained(tmp_path / "1", *settings, "update.microbatch_size=1", task=Talk())
    six = trained(tmp_path / "6", *settings, "update.microbatch_size=6", task=Talk())
    assert farthest(weights(one), weights(six)) < 1e-6
    rollout = rollout_of(trainer := Trainer(run_config(tmp_path / "look", *settings), task=Talk()))
    gaps_BT = ~rollout.mask_BT & rollout.attention_BS[:, rollout.prompt_length :]
    assert gaps_BT.any()
    estimates, _ = trainer.estimate(rollout)
    assert (estimates.advantages_BT[gaps_BT] == 0).all()
    assert (estimates.targets_BTL[gaps_BT] == 0).all()
    trainer.close()


# A reward model


def test_the_drift_of_a_reward_model_is_logged_at_every_step(tmp_path: Path):
    """`reward/pairwise_accuracy` is what the responses of the step themselves say; a tie would count 1/2."""
    noise = ["noise.kind=response_reward_model", "noise.accuracy=0.72", "sampling.samples_per_prompt=8"]
    trainer = trained(tmp_path / "run", *noise, "steps=4", "log.completions=16")
    texts = rows(trainer, "completions")
    for row in rows(trainer):
        step = [r for r in texts if r["step"] == row["step"]]
        right, wrong = ([r for r in step if r["true"] == true] for true in (1, 0))
        pairs = [r["observed"] > w["observed"] for r in right for w in wrong if r["prompt_id"] == w["prompt_id"]]
        assert len(pairs) > 4
        assert row["reward/pairwise_accuracy"] == pytest.approx(sum(pairs) / len(pairs))


# Reward functions that misbehave


def counted(folder: Path, reward: Any, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]], Trainer]:
    trainer = trained(folder, "steps=1", "evaluation.prompts=1", *overrides, reward=reward)
    [row] = rows(trainer)
    return row, rows(trainer, "faults"), trainer


def test_none_and_nan_are_no_opinion_infinity_is_a_fault_and_neither_counts_as_0(tmp_path: Path):
    def reward(prompts, completions, completion_ids, **columns):
        return [None, float("nan"), float("inf"), 1.0, 1.0, 1.0][: len(prompts)]

    row, faults, _ = counted(tmp_path / "run", reward)
    assert row["reward/missing"] == 0.5
    assert row["reward/observed"] == 1.0
    assert row["reward/faults"] == 1
    assert [fault["kind"] for fault in faults] == ["non_finite"]
    assert {"prompt_id", "visit", "sample", "completion", "message"} <= faults[0].keys()


def test_a_sample_on_which_the_function_raises_loses_its_reward_and_the_others_keep_theirs(tmp_path: Path):
    def reward(prompts, completions, completion_ids, **columns):
        return [1.0 if sum(ids) % 2 else 1 / 0 for ids in completion_ids]

    row, faults, trainer = counted(tmp_path / "run", reward, "log.completions=6")
    odd = sum(r["true"] == 0 for r in rows(trainer, "completions"))
    assert 0 < odd < 6
    assert row["reward/faults"] == 6 - odd == len(faults)
    assert row["reward/missing"] == pytest.approx(1 - odd / 6)
    assert row["reward/observed"] == 1.0
    assert "ZeroDivisionError" in faults[0]["message"]


def test_a_function_that_hangs_costs_its_time_limit_and_not_the_run(tmp_path: Path):
    def reward(prompts, completions, completion_ids, **columns):
        import time

        time.sleep(60)

    row, faults, trainer = counted(tmp_path / "run", reward, "reward.timeout=0.05")
    assert trainer.step == 1
    assert row["reward/missing"] == 1.0
    assert {fault["kind"] for fault in faults} == {"timeout"}
    assert row["reward/observed"] is None  # not 0: nothing was observed


def test_a_list_of_the_wrong_length_for_one_response_is_that_responses_fault(tmp_path: Path):
    def reward(prompts, completions, completion_ids, **columns):
        return [[1.0] * 99, *[1.0] * 5][: len(prompts)]

    row, faults, _ = counted(tmp_path / "run", reward)
    assert row["reward/missing"] == pytest.approx(1 / 6)
    assert [fault["kind"] for fault in faults] == ["wrong_length"]
    assert "a list of 99 rewards fits neither the 1 turns nor the" in faults[0]["message"]


def test_too_few_rewards_for_every_batch_end_the_first_step_in_one_sentence(tmp_path: Path):
    def reward(prompts, completions, completion_ids, **columns):
        return [1.0] * min(len(prompts), 5)

    with pytest.raises(InputError, match="returned 5 entries for 6 completions"):
        counted(tmp_path / "run", reward)
