"""What the critic worker makes of batches that tempt it, and what it keeps."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from reference import Reference
from torch import Tensor
from verl.single_controller.ray import RayWorkerGroup
from verl.utils import tensordict_utils
from workers import as_verl_has_it, learn, nested, packed, values_of

from dvpo.critic import load_critic
from dvpo.integrations.verl.objective import make_objective
from dvpo.integrations.verl.worker import CriticLoss


def losses(group: RayWorkerGroup, batch: dict[str, Tensor], steps: int, **how: object) -> list[float]:
    """Of some steps, in each of which the critic is asked and then learns."""
    found = []
    for _ in range(steps):
        values_of(group, batch, **how)
        found.append(float(np.mean(learn(group, batch, **how)["loss"])))
    return found


# The padding trap.


def test_verls_jagged_tensors_of_three_dimensions_are_padded_wrongly_once_they_are_cut():
    """Why targets never stand in a batch. When this fails, verl or torch is mended, and they could."""
    lengths = [3, 1, 2, 4]
    rows = [torch.full((n, 2), float(i)) for i, n in enumerate(lengths)]
    told = packed({"input_ids": nested([torch.arange(n) for n in lengths]), "targets": nested(rows)})
    cut = tensordict_utils.chunk_tensordict(told, 2)[1]
    padded_BTL, mask_BT = cut["targets"].to_padded_tensor(0.0), cut["input_ids"].to_padded_tensor(-1) >= 0
    assert padded_BTL.shape[1] != mask_BT.shape[1] == 4
    wrong = padded_BTL.flatten(0, 1)[mask_BT.flatten().nonzero().flatten()]
    right = torch.cat(rows[2:])
    assert wrong.shape == right.shape  # nothing complains
    assert not torch.equal(wrong, right)
    assert torch.equal(cut["targets"].values(), right)  # what is laid end to end is sound


@pytest.mark.parametrize("how", [{"micro_batch_size_per_gpu": 1}, {"use_dynamic_bsz": True}, {}], ids=str)
def test_targets_stay_with_their_responses_however_a_batch_is_cut_and_shuffled(
    how: dict[str, object], reference: Reference, one_rank: RayWorkerGroup
):
    batch = as_verl_has_it(reference.rollout)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = {name: nested([tensor.unbind()[row] for row in order]) for name, tensor in batch.items()}
    one_rank.reset()
    expected = losses(one_rank, batch, steps=2, micro_batch_size_per_gpu=8)
    one_rank.reset()
    assert losses(one_rank, shuffled, steps=2, **how) == pytest.approx(expected, rel=1e-5)
    one_rank.reset()
    wrong = {**batch, "rm_scores": exchanged(batch["rm_scores"])}
    assert losses(one_rank, wrong, steps=1) != pytest.approx(expected[:1], rel=1e-3)


def exchanged(rewards: Tensor) -> Tensor:
    """Every response has its neighbour's return, at its end."""
    rows = rewards.unbind()
    return nested(
        [torch.zeros_like(row).index_put((torch.tensor(-1),), rows[i - 1].sum()) for i, row in enumerate(rows)]
    )


# Batches.


def with_padding(batch: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The rows that verl appends where a batch cannot be divided: one response token, which is nobody's."""
    prompt, response, zero = torch.full((7,), 1), torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    row = {
        "prompts": prompt,
        "responses": response,
        "input_ids": torch.cat([prompt, response]),
        "position_ids": torch.arange(8),
        "response_mask": zero,
        "loss_mask": zero,
        "rm_scores": zero.float(),
    }
    return {name: nested([*tensor.unbind(), *[row[name]] * rows]) for name, tensor in batch.items()}


def test_rows_that_are_padding_change_nothing_even_where_a_micro_batch_has_no_others(
    reference: Reference, two_ranks: RayWorkerGroup
):
    batch = as_verl_has_it(reference.rollout)
    how = {"micro_batch_size_per_gpu": 1}
    two_ranks.reset()
    expected = losses(two_ranks, batch, steps=3, **how)
    two_ranks.reset()
    assert losses(two_ranks, with_padding(batch, rows=2), steps=3, **how) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 3


def test_a_penalty_in_the_rewards_reaches_the_targets(reference: Reference, one_rank: RayWorkerGroup):
    batch = as_verl_has_it(reference.rollout)
    penalised = nested([rewards_T - 0.5 for rewards_T in batch["rm_scores"].unbind()])
    one_rank.reset()
    expected = losses(one_rank, {**batch, "rm_scores": penalised}, steps=1)
    one_rank.reset()
    both = {**batch, "token_level_rewards": penalised}
    assert losses(one_rank, both, steps=1) == expected
    one_rank.reset()
    assert losses(one_rank, batch, steps=1) != expected


def test_a_batch_that_was_not_evaluated_is_not_learnt_from(reference: Reference, one_rank: RayWorkerGroup):
    batch = as_verl_has_it(reference.rollout)
    reversed_rows = {name: nested(list(tensor.unbind())[::-1]) for name, tensor in batch.items()}
    values_of(one_rank, batch)
    with pytest.raises(ray.exceptions.RayTaskError, match="has not just evaluated"):
        learn(one_rank, reversed_rows)


@pytest.mark.parametrize(("name", "value"), [("num_quantiles", 16), ("num_heads", 2), ("monotone", False)])
def test_a_critic_prepared_otherwise_is_refused(
    name: str, value: object, reference: Reference, one_rank: RayWorkerGroup
):
    other = make_objective({"critic": {"num_heads": 3, "num_quantiles": 8, name: value}}, gamma=1.0, lam=0.95)
    with pytest.raises(ray.exceptions.RayTaskError, match=f"dvpo.critic.{name} = {value}, but .* was prepared with"):
        one_rank.set_loss_fn(CriticLoss(other))


# Checkpoints.


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    reference: Reference, two_ranks: RayWorkerGroup, tmp_path: Path
):
    batch = as_verl_has_it(reference.rollout)
    two_ranks.reset()
    losses(two_ranks, batch, steps=2)
    two_ranks.save_checkpoint(str(tmp_path / "saved"), global_step=2)
    values = values_of(two_ranks, batch)
    expected = losses(two_ranks, batch, steps=2)
    two_ranks.reset()
    two_ranks.load_checkpoint(str(tmp_path / "saved"))
    again = values_of(two_ranks, batch)
    assert all(torch.equal(one, other) for one, other in zip(values, again, strict=True))
    assert losses(two_ranks, batch, steps=2) == expected
    two_ranks.save_checkpoint(str(tmp_path / "later"), global_step=4)
    saved, later = (load_critic(tmp_path / name / "critic") for name in ("saved", "later"))
    assert saved.shape == later.shape == load_critic(reference.folder).shape
    state = saved.heads.state_dict()
    assert all(not torch.equal(state[name], tensor) for name, tensor in later.heads.state_dict().items())


def test_the_exported_critic_says_what_the_worker_said(reference: Reference, two_ranks: RayWorkerGroup, tmp_path: Path):
    batch = as_verl_has_it(reference.rollout)
    two_ranks.reset()
    losses(two_ranks, batch, steps=1)
    two_ranks.save_checkpoint(str(tmp_path), global_step=1)
    values = values_of(two_ranks, batch)
    critic = load_critic(tmp_path / "critic")
    row = batch["input_ids"].unbind()[0]
    with torch.no_grad():
        hidden_SD = critic.trunk(row[None]).last_hidden_state[0]
        value_S = critic(hidden_SD).mean(dim=(-2, -1))
    length = len(batch["responses"].unbind()[0])
    torch.testing.assert_close(values[0][-length - 1 : -1], value_S[-length - 1 : -1], rtol=1e-4, atol=1e-6)
