"""The forward pass of the estimate serves the critic's first micro-batch too, and no stale one ever does."""

from pathlib import Path

import pytest
import torch

from dvpo.trainer import Trainer
from runs import Parity, Talk, run_config
from test_trainer import farthest, rows, weights


def opened(folder: Path, *overrides: str) -> Trainer:
    return Trainer(run_config(folder, "algorithm=dvpo", *overrides), task=Parity())


def passes(trainer: Trainer) -> list[bool]:
    """Whether each forward pass of the critic's states had a gradient, in a list that grows."""
    calls: list[bool] = []
    states = trainer.critic.states
    trainer.critic.states = lambda *arguments: (calls.append(torch.is_grad_enabled()), states(*arguments))[1]
    return calls


@pytest.mark.parametrize(
    ("minibatches", "expected"),
    [
        (1, [True]),  # the estimate's pass is the update's
        (2, [True, False, True]),  # first half kept; second half for the estimate; second half anew: weights moved
    ],
)
def test_the_first_microbatch_goes_through_the_trunk_once(tmp_path: Path, minibatches: int, expected: list[bool]):
    trainer = opened(tmp_path / "run", f"update.minibatches={minibatches}")
    calls = passes(trainer)
    trainer.train_step()
    trainer.close()
    assert calls == expected


class Twice(Trainer):
    """Never keeps a pass."""

    def estimate(self, rollout):
        self.critic_pass.expect(torch.arange(0))
        return super().estimate(rollout)


@pytest.mark.parametrize("settings", [(), ("critic.trunk=shared",), ("update.epochs=2", "update.microbatch_size=2")])
def test_a_run_is_the_same_with_two_passes(tmp_path: Path, settings: tuple[str, ...]):
    # Adam with a large eps is linear in the gradient: rounding stays rounding.
    linear = [f"{name}.{key}" for name in ("policy_optimiser", "critic_optimiser") for key in ("eps=10", "lr=1")]
    runs = []
    for kind in (Trainer, Twice):
        config = run_config(tmp_path / kind.__name__, "algorithm=dvpo", *linear, *settings)
        trainer = kind(config, task=Parity())
        trainer.train()
        runs.append((weights(trainer), rows(trainer)))
    (one, log), (other, other_log) = runs
    assert farthest(one, other) < 1e-5
    for row, other_row in zip(log, other_log, strict=True):
        assert row == pytest.approx(other_row, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(("algorithm", "expected"), [("dvpo", 1), ("ppo", 1), ("ppo_hl_gauss", 2)])
def test_the_heads_are_asked_once_where_the_loss_is_about_the_values(tmp_path: Path, algorithm: str, expected: int):
    trainer = opened(tmp_path / "run", f"algorithm={algorithm}", "update.minibatches=1")
    calls: list[torch.Tensor] = []
    trainer.critic.heads.linear.register_forward_hook(lambda module, given, out: calls.append(out))
    trainer.train_step()
    trainer.close()
    assert len(calls) == expected


def test_what_was_kept_is_dropped_once_a_weight_has_moved(tmp_path: Path):
    trainer = opened(tmp_path / "run")
    rollout, _ = trainer.collect()
    first_B = torch.tensor([4, 1])
    micro = rollout.select(first_B).trimmed()
    states_BUD = trainer.critic.states(micro, trainer.policy).detach()
    before_KNM = trainer.critic(states_BUD[:, :-1][micro.mask_BT])

    def found() -> torch.Tensor:
        trainer.critic_pass.expect(first_B)
        trainer.critic_pass.values(rollout)
        if spoil:
            with torch.no_grad():
                trainer.critic.trunk.norm.weight.mul_(2.0)
        return trainer.critic_pass.predictions(first_B, micro, micro.mask_BT)

    spoil = False
    kept_KNM = found()
    assert kept_KNM.requires_grad
    torch.testing.assert_close(kept_KNM, before_KNM, rtol=1e-6, atol=1e-6)
    spoil = True
    assert not torch.allclose(found(), before_KNM, rtol=1e-4)
    trainer.close()


def test_values_stand_in_the_rows_order_whichever_came_first(tmp_path: Path):
    trainer = opened(tmp_path / "run", "advantage.truncation=bootstrap")
    rollout, _ = trainer.collect()
    plain = trainer.critic_pass.values(rollout)
    trainer.critic_pass.expect(torch.tensor([5, 0, 3]))
    kept = trainer.critic_pass.values(rollout)
    for one, other in zip(plain, kept, strict=True):
        mask = rollout.mask_BT if one.dim() == 4 else slice(None)
        torch.testing.assert_close(one[mask], other[mask], rtol=1e-5, atol=1e-6)
    # Other rows are asked for first, as many as were kept: in those no token may train.
    rows_B = torch.tensor([1, 2, 4])
    micro = rollout.select(rows_B).trimmed()
    mask_BT = micro.mask_BT
    expected_KNM = plain[0][rows_B, : mask_BT.shape[1]][mask_BT]
    predicted_KNM = trainer.critic_pass.predictions(rows_B, micro, mask_BT)
    torch.testing.assert_close(predicted_KNM.detach(), expected_KNM, rtol=1e-5, atol=1e-6)
    trainer.close()


def test_what_was_kept_of_one_rollout_is_nothing_to_the_next(tmp_path: Path):
    trainer = opened(tmp_path / "run")
    (one, _), (other, _) = trainer.collect(), trainer.collect()
    first_B = torch.tensor([4, 1])
    trainer.critic_pass.expect(first_B)
    trainer.critic_pass.values(one)
    calls = passes(trainer)
    trainer.critic_pass.values(other)
    assert not any(calls)  # nor is a graph kept of rows that nobody announced
    micro = other.select(first_B).trimmed()
    predicted_KNM = trainer.critic_pass.predictions(first_B, micro, micro.mask_BT)
    expected_KNM = trainer.critic(trainer.critic.states(micro, trainer.policy)[:, :-1][micro.mask_BT])
    torch.testing.assert_close(predicted_KNM, expected_KNM)
    trainer.close()


def test_what_was_kept_is_handed_out_once(tmp_path: Path):
    trainer = opened(tmp_path / "run")
    rollout, _ = trainer.collect()
    first_B = torch.tensor([4, 1])
    micro = rollout.select(first_B).trimmed()
    trainer.critic_pass.expect(first_B)
    trainer.critic_pass.values(rollout)
    for _ in range(2):  # a graph can be gone through backwards once
        trainer.critic_pass.predictions(first_B, micro, micro.mask_BT).sum().backward()
    trainer.close()


def test_the_end_is_the_state_behind_the_last_token_and_what_the_environment_said_counts_too(tmp_path: Path):
    settings = ["algorithm=dvpo", "sampling.max_completion_length=24"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Talk())
    rollout, _ = trainer.collect()
    ends_B = rollout.attention_BS[:, rollout.prompt_length :].sum(dim=-1)
    assert (ends_B > rollout.mask_BT.sum(dim=-1)).any()  # the policy's own tokens would end too early
    with torch.no_grad():
        values_BUNM = trainer.critic(trainer.critic.states(rollout, trainer.policy))
    _, bootstrap_BNM = trainer.critic_pass.values(rollout)
    torch.testing.assert_close(bootstrap_BNM, values_BUNM[torch.arange(len(rollout)), ends_B], rtol=1e-4, atol=1e-5)
    trainer.close()


@pytest.mark.parametrize("kept", [True, False])
def test_a_vocabulary_critic_learns_the_q_of_the_token_behind_each_state(tmp_path: Path, kept: bool):
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=cql_ppo"), task=Parity())
    rollout, _ = trainer.collect()
    rows_B = torch.tensor([4, 1])
    micro = rollout.select(rows_B).trimmed()
    if kept:
        trainer.critic_pass.expect(rows_B)
        trainer.critic_pass.values(rollout)
    pair_KNM = trainer.critic_pass.predictions(rows_B, micro, micro.mask_BT)
    actions_BTV = trainer.critic.heads(trainer.critic.states(micro, trainer.policy)[:, :-1])
    taken_BT = actions_BTV.gather(-1, micro.response_BT.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(pair_KNM[:, 0, 0], taken_BT[micro.mask_BT])
    torch.testing.assert_close(pair_KNM[:, 0, 1], actions_BTV.logsumexp(dim=-1)[micro.mask_BT])
    trainer.close()
