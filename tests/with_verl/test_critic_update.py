"""The critic's update in verl's workers is our own trainer's: the same targets, terms, gradients and weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import ADAM, EPOCHS, TERMS, Reference
from workers import as_verl_has_it, critic_workers, learn, values_of

from dvpo.critic import load_critic
from runs import farthest

CASES = {
    "1 rank, activations recomputed": ("one_rank", {}),
    "2 ranks": ("two_ranks", {}),
    "2 ranks, one response at a time": ("two_ranks", {"micro_batch_size_per_gpu": 1}),
    "2 ranks, all responses at once": ("two_ranks", {"micro_batch_size_per_gpu": 4}),
    "2 ranks, by token budget, without padding": (
        "two_ranks",
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": 70, "use_remove_padding": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_in_verl_is_our_own_trainers(
    case: str, reference: Reference, request: pytest.FixtureRequest, tmp_path: Path
):
    workers, how = CASES[case]
    group, batch = request.getfixturevalue(workers), as_verl_has_it(reference.rollout)
    group.reset()
    values = values_of(group, batch, **how)
    metrics = learn(group, batch, epochs=EPOCHS, **how)
    group.save_checkpoint(str(tmp_path), global_step=1)
    for row, value_S in enumerate(values):
        mask_T = batch["response_mask"].unbind()[row].bool()
        value_T = value_S[-len(mask_T) - 1 : -1]
        ours_T = reference.values_BT[row, : len(mask_T)]
        torch.testing.assert_close(value_T[mask_T], ours_T[mask_T], rtol=1e-5, atol=1e-6)
        assert (value_S[: -len(mask_T) - 1] == 0).all()
    for name in (*TERMS, "loss", "grad_norm"):
        assert np.mean(metrics[name]) == pytest.approx(reference.figures[f"critic/{name}"], rel=1e-5, abs=1e-6), name
    after = list(load_critic(tmp_path / "critic").parameters())
    before = list(load_critic(reference.folder).parameters())
    assert farthest(before, reference.after) > 0.01
    assert farthest(after, reference.after) < 1e-5


def test_heads_are_float32_where_the_trunk_computes_in_bf16(cluster: None, reference: Reference):
    batch = as_verl_has_it(reference.rollout)
    how = {"ranks": 1, "optimiser": ADAM, "precision": "bf16"}
    with critic_workers(reference.folder, reference.objective, **how) as group:
        values = torch.cat(values_of(group, batch))
        loss = np.mean(learn(group, batch, epochs=EPOCHS)["loss"])
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())
    assert loss == pytest.approx(reference.figures["critic/loss"], rel=0.02)
