"""The update: what is minimised, in which parts, how often, and which module moves."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from dvpo.batch import Estimates, Rollout
from dvpo.trainer import Trainer
from dvpo.update import Learner
from runs import Parity, farthest, rollout_of, run_config

NO_CRITIC = ["algorithm=grpo", "update.minibatches=1"]


def opened(folder: Path, *overrides: str) -> tuple[Trainer, list[float]]:
    """A trainer, and the losses that its policy's optimiser is given, in a list that grows."""
    trainer = Trainer(run_config(folder, *NO_CRITIC, *overrides), task=Parity())
    losses: list[float] = []
    update = trainer.policy_optimiser.update
    trainer.policy_optimiser.update = lambda step, loss: losses.append(loss) or update(step, loss)
    return trainer, losses


@pytest.mark.parametrize("trunk", ["own", "frozen", "shared"])
def test_the_first_update_starts_from_ratio_1_and_the_critics_trunk_follows_its_rule(tmp_path: Path, trunk: str):
    trainer = Trainer(run_config(tmp_path / "run", f"critic.trunk={trunk}", "update.minibatches=1"), task=Parity())
    trunk_before = [p.detach().clone() for p in trainer.critic.trunk.parameters()] if trainer.critic.trunk else []
    figures = trainer.train_step()
    # The sampler's log-probs (cached, left-padded) and the trainer's (whole, trimmed) differ by rounding only.
    assert figures["actor/sampler_mismatch"] < 1e-5
    assert figures["actor/clip_share"] == 0
    assert figures["actor/kl"] < 1e-9
    if trainer.critic.trunk:
        moved = farthest(trunk_before, list(trainer.critic.trunk.parameters())) > 0
        assert moved == (trunk == "own")
    trainer.close()


def test_epochs_and_minibatches_are_so_many_optimiser_steps_of_either_module(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", "update.epochs=3", "update.minibatches=2"), task=Parity())
    calls: list[str] = []
    step = trainer._step
    trainer._step = lambda optimiser, name, *rest: calls.append(name) or step(optimiser, name, *rest)
    figures = trainer.train_step()
    assert calls == ["critic", "actor"] * 6
    assert trainer.policy_version == 6
    assert figures["actor/kl"] > 0
    trainer.close()


def test_while_the_critic_warms_up_the_policy_stays_bit_for_bit(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", "update.actor_warmup_steps=2", "steps=3"), task=Parity())
    policy = [p.detach().clone() for p in trainer.policy.model.parameters()]
    critic = [p.detach().clone() for p in trainer.critic.parameters()]
    for warm in (True, True, False):
        figures = trainer.train_step()
        unchanged = all(torch.equal(a, b) for a, b in zip(policy, trainer.policy.model.parameters(), strict=True))
        assert unchanged == warm
        assert ("actor/loss" in figures) != warm
    assert farthest(critic, list(trainer.critic.parameters())) > 0
    trainer.close()


def test_the_critics_gradient_does_not_shrink_the_policys_update(tmp_path: Path):
    """Two modules, two clip norms: a critic loss a million times as large leaves the first policy step as it is."""
    small = Trainer(run_config(tmp_path / "small", "critic_optimiser.lr=0"), task=Parity())
    large = Trainer(run_config(tmp_path / "large", "critic_optimiser.lr=0"), task=Parity())
    loss = large.row.critic_loss
    large.row = dataclasses.replace(large.row, critic_loss=lambda *given: {"loss": 1e6 * loss(*given)["loss"]})
    for trainer in (small, large):
        trainer.train_step()
        trainer.close()
    assert farthest(list(small.policy.model.parameters()), list(large.policy.model.parameters())) == 0


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_sum_fixed_length"])
def test_the_loss_is_aggregated_as_told_and_logged_as_the_plain_mean_of_its_tokens(tmp_path: Path, aggregation: str):
    trainer, losses = opened(tmp_path / "run", f"actor.aggregation={aggregation}", "update.microbatch_size=4")
    rollout = rollout_of(trainer)
    estimates, _ = trainer.estimate(rollout)
    lengths_B = rollout.mask_BT.sum(dim=1)
    row, shortest, tokens = int(lengths_B.argmin()), int(lengths_B.min()), int(lengths_B.sum())
    assert shortest < int(lengths_B.max())  # or the three would be one
    # Ratio 1 and advantage 1 for the n tokens of the shortest of 6 responses, 0 for the others: n tokens of loss -1.
    advantages_BT = torch.zeros_like(estimates.advantages_BT)
    advantages_BT[row] = rollout.mask_BT[row].float()
    figures = trainer.update(rollout, dataclasses.replace(estimates, advantages_BT=advantages_BT))
    expected = {
        "token_mean": -shortest / tokens,
        "seq_mean_token_mean": -1 / 6,
        "seq_sum_fixed_length": -shortest / (6 * 12),  # of sampling.max_completion_length = 12, not of the longest
    }
    assert losses == [pytest.approx(expected[aggregation], rel=1e-4)]
    assert figures["actor/loss"] == pytest.approx(-shortest / tokens, rel=1e-4)
    trainer.close()


def with_lower(trainer: Trainer) -> tuple[Rollout, Estimates, torch.Tensor]:
    """A rollout, its estimates, and log-probs that lie log 1.5 below the sampler's at each of its tokens."""
    rollout = rollout_of(trainer)
    estimates, _ = trainer.estimate(rollout)
    return rollout, estimates, rollout.sampler_logprobs_BT - math.log(1.5) * rollout.mask_BT


def test_the_entropy_bonus_is_taken_from_the_loss_and_the_entropy_is_in_nats(tmp_path: Path):
    trainer, losses = opened(tmp_path / "run", "actor.entropy_coef=0.5")
    with torch.no_grad():  # tied embeddings of 0: each of the 264 tokens is as likely as any other
        trainer.policy.model.get_output_embeddings().weight.zero_()
    rollout = rollout_of(trainer)
    estimates, _ = trainer.estimate(rollout)
    nothing_BT = torch.zeros_like(estimates.advantages_BT)
    figures = trainer.update(rollout, dataclasses.replace(estimates, advantages_BT=nothing_BT))
    assert figures["actor/entropy"] == pytest.approx(math.log(264), rel=1e-5)
    assert losses == [pytest.approx(-0.5 * math.log(264), rel=1e-5)]
    assert figures["actor/loss"] == 0  # the surrogate alone
    trainer.close()


def test_the_entropy_bonus_draws_the_entropy_up_when_nothing_else_draws(tmp_path: Path):
    trainer, _ = opened(tmp_path / "run", "actor.entropy_coef=1", "policy_optimiser.lr=3e-3")
    rollout = rollout_of(trainer)
    estimates, _ = trainer.estimate(rollout)
    still = dataclasses.replace(estimates, advantages_BT=torch.zeros_like(estimates.advantages_BT))
    entropies = [trainer.update(rollout, still)["actor/entropy"] for _ in range(8)]
    assert entropies[0] + 0.01 < entropies[-1] < math.log(264)
    trainer.close()


def test_each_kl_has_its_own_direction_and_the_penalty_is_added_to_the_loss_by_the_steered_coefficient(tmp_path: Path):
    trainer, losses = opened(tmp_path / "run", "actor.kl.coef=0.1")
    trainer.kl.coef = 0.5  # as a target would have steered it
    rollout, estimates, lower_BT = with_lower(trainer)
    nothing_BT = torch.zeros_like(estimates.advantages_BT)
    figures = trainer.update(
        dataclasses.replace(rollout, old_logprobs_BT=lower_BT),
        dataclasses.replace(estimates, reference_BT=lower_BT, advantages_BT=nothing_BT),
    )
    # d = log 1.5 for every token. KL(sampling, current): exp(d) - 1 - d = .5 - .405465 = .094535.
    # KL(current, starting): exp(-d) - 1 + d = 2/3 - 1 + .405465 = .072132. Swapped, they would be each other.
    assert figures["actor/kl"] == pytest.approx(0.094535, abs=1e-5)
    assert figures["actor/kl_reference"] == pytest.approx(0.072132, abs=1e-5)
    assert losses == [pytest.approx(0.5 * 0.072132, abs=1e-5)]
    trainer.close()


def test_a_kl_in_the_reward_is_in_the_loss_of_no_token_and_its_distance_is_logged(tmp_path: Path):
    trainer, losses = opened(tmp_path / "run", "actor.kl.coef=0.1", "actor.kl.place=reward")
    rollout, estimates, lower_BT = with_lower(trainer)
    nothing_BT = torch.zeros_like(estimates.advantages_BT)
    figures = trainer.update(rollout, dataclasses.replace(estimates, reference_BT=lower_BT, advantages_BT=nothing_BT))
    assert losses == [0]
    assert figures["actor/kl_reference"] == pytest.approx(0.072132, abs=1e-5)  # as above
    trainer.close()


def test_the_correction_weighs_the_surrogate_alone_and_what_is_logged_of_that_is_without_it(tmp_path: Path):
    trainer, losses = opened(tmp_path / "run", "actor.kl.coef=0.5", "sampling.correction.kind=truncated")
    rollout, estimates, lower_BT = with_lower(trainer)
    figures = trainer.update(
        dataclasses.replace(rollout, sampler_logprobs_BT=lower_BT),
        dataclasses.replace(estimates, reference_BT=lower_BT, advantages_BT=rollout.mask_BT.float()),
    )
    # A surrogate of -1 counts 1.5 times, a penalty of .072132 (as above) times .5 once: -1.5 + .036066 = -1.463934.
    assert losses == [pytest.approx(-1.463934, abs=1e-4)]
    assert figures["actor/loss"] == pytest.approx(-1, abs=1e-5)
    trainer.close()


def test_tokens_that_do_not_train_are_in_no_loss_figure_or_denominator_of_either_module(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", "update.minibatches=1", "update.microbatch_size=4"), task=Parity())
    losses: dict[str, float] = {}
    step = trainer._step
    trainer._step = lambda optimiser, name, loss, *rest: (
        losses.update({name: float(loss)}) or step(optimiser, name, loss, *rest)
    )
    rollout = rollout_of(trainer)
    estimates, _ = trainer.estimate(rollout)
    mask_BT = rollout.mask_BT.clone()
    mask_BT[0] = False  # a response that left the step: whatever is said of it, the loss of the others is a mean
    advantages_BT, targets_BTL = rollout.mask_BT.float(), estimates.targets_BTL.clone()
    advantages_BT[0] = targets_BTL[0] = 100.0
    figures = trainer.update(
        rollout,
        dataclasses.replace(estimates, mask_BT=mask_BT, advantages_BT=advantages_BT, targets_BTL=targets_BTL),
    )
    assert losses["actor"] == pytest.approx(-1, abs=1e-5)  # ratio 1, advantage 1
    assert figures["actor/loss"] == pytest.approx(-1, abs=1e-5)
    assert losses["critic"] == pytest.approx(figures["critic/loss"], rel=1e-5)
    assert 0 < losses["critic"] < 10
    trainer.close()


def test_the_order_of_the_rows_has_a_seed_of_the_run_and_of_what_it_is_for(tmp_path: Path):
    def order(seed: int, *key: str | int) -> list[int]:
        learner = Learner()
        learner.config, learner.device = run_config(tmp_path, f"seed={seed}"), torch.device("cpu")
        return torch.cat(learner._minibatches(range(40), *key)).tolist()  # type: ignore[arg-type]

    plain = order(0, "rows", 1, 0)
    assert order(0, "rows", 1, 0) == plain
    others = [order(1, "rows", 1, 0), order(0, "rows", 2, 0), order(0, "rows", 1, 1), order(0, "replay", 1, 0)]
    assert all(sorted(other) == sorted(plain) and other != plain for other in others)


def test_every_epoch_goes_once_through_all_responses_in_parts_as_equal_as_possible(tmp_path: Path):
    settings = ["algorithm=grpo", "update.epochs=2", "update.minibatches=4"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity())
    parts: list[list[int]] = []
    update = trainer._update_actor
    trainer._update_actor = lambda rollout, estimates, rows, means: (
        parts.append(rows.tolist()) or update(rollout, estimates, rows, means)
    )
    trainer.train_step()
    assert [len(part) for part in parts] == [2, 2, 1, 1] * 2  # 6 responses
    first, second = ([row for part in epoch for row in part] for epoch in (parts[:4], parts[4:]))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second  # shuffled anew
    trainer.close()


def test_the_gradient_norm_is_a_mean_over_the_steps_that_were_made_and_the_skipped_are_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=grpo", "update.minibatches=4"), task=Parity())
    made = iter([(3.0, True), (math.inf, False), (5.0, True), (math.nan, False)])
    monkeypatch.setattr(trainer.policy_optimiser, "update", lambda step, loss: next(made))
    figures = trainer.train_step()
    assert figures["actor/grad_norm"] == 4
    assert figures["actor/skipped_updates"] == 0.5
    trainer.close()


def test_in_a_second_epoch_the_ratio_is_still_against_the_sampling_policy(tmp_path: Path):
    settings = [*NO_CRITIC, "update.epochs=3", "policy_optimiser.lr=3e-3"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity([1.0, 0.0]))  # a group with signal
    given: list[tuple[torch.Tensor, ...]] = []
    loss = trainer.row.actor_loss

    def noted(logprobs_K, old_logprobs_K, advantages_K, config):
        given.append((logprobs_K.detach().clone(), old_logprobs_K.clone(), advantages_K.clone()))
        return loss(logprobs_K, old_logprobs_K, advantages_K, config)

    trainer.row = dataclasses.replace(trainer.row, actor_loss=noted)
    figures = trainer.train_step()
    assert figures["actor/sampler_mismatch"] < 1e-5  # before the first update alone: later on it would be learning
    # Each epoch is one minibatch of the same six responses in another order: sorted, old log-probs are the same ones.
    (now, old, advantages), *later = ([values.sort().values for values in epoch] for epoch in given)
    assert len(later) == 2
    for new, same_old, same_advantages in later:
        assert torch.equal(same_old, old)
        assert torch.equal(same_advantages, advantages)
        assert (new - now).abs().max() > 1e-3
    trainer.close()
