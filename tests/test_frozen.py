"""Weights that never learn are held in the compute type, which changes nothing but memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dvpo.frozen import hold_frozen
from dvpo.inspection import open_subject
from dvpo.policy import open_policy
from runs import trained
from tiny_models import FAMILIES, tiny_policy

CPU = torch.device("cpu")
LOW = "model.dtype=bfloat16"
TOKENS = torch.randint(2, 240, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_that_does_not_learn_computes_the_same_bit_for_bit_from_less(tmp_path: Path, family: str):
    tiny_policy(family).save(tmp_path)
    learning, frozen = (open_policy(tmp_path, CPU, "bfloat16", learns=learns) for learns in (True, False))
    size, less = (sum(p.nbytes for p in policy.model.parameters()) for policy in (learning, frozen))
    assert less < size
    with torch.no_grad():
        one, other = (
            policy.logits(policy.hidden_states(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool)))
            for policy in (learning, frozen)
        )
    assert torch.equal(one, other)
    assert {p.dtype for p in learning.model.parameters()} == {torch.float32}
    assert {p.dtype for p in open_policy(tmp_path, CPU, learns=False).model.parameters()} == {torch.float32}


def test_linear_layers_alone_are_cast_and_no_weight_that_is_an_embedding_too():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 3), "norm": nn.LayerNorm(3), "up": nn.Linear(3, 5)})
    model["head"] = nn.Linear(3, 7, bias=False)
    model["head"].weight = model["embedding"].weight
    hold_frozen(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == {"up.weight", "up.bias"}
    assert not any(p.requires_grad for p in model.parameters())
    assert model["head"].weight is model["embedding"].weight


def test_a_trunk_that_learns_whole_is_no_copy_of_rounded_type(tmp_path: Path):
    run = trained(tmp_path / "run", LOW, "model.lora.rank=4", "critic.lora.rank=0", "steps=1")
    assert {(p.dtype, p.requires_grad) for p in run.critic.parameters()} == {(torch.float32, True)}
    assert run.policy.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16


def test_a_checkpoint_is_float32_and_loads_as_it_was(tmp_path: Path):
    run = trained(tmp_path / "run", LOW, "model.lora.rank=4", "model.lora.targets=[q_proj]", "steps=1")
    saved = load_file(run.folder / "checkpoint-1" / "policy" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert open_policy(run.folder / "checkpoint-1" / "policy", CPU).model.config.dtype == torch.float32
    subject = open_subject(run.folder)
    assert subject.critic.trunk.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    again = subject.policy
    assert again.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    ones = torch.ones_like(TOKENS, dtype=torch.bool)
    with torch.no_grad():
        one, other = again.hidden_states(TOKENS, ones), run.policy.hidden_states(TOKENS, ones)
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_a_frozen_trunk_and_a_reference_are_held_in_the_compute_type_and_change_no_run(tmp_path: Path, monkeypatch):
    settings = (LOW, "critic.trunk=frozen", "actor.kl.coef=0.1", "steps=2")
    held = trained(tmp_path / "held", *settings)
    for file in ("policy/model.safetensors", "critic/critic.safetensors"):
        saved = load_file(held.folder / "checkpoint-2" / file)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for model in (held.reference.model.base_model, held.critic.trunk):
        assert model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for module in ("critic", "policy"):
        monkeypatch.setattr(f"dvpo.{module}.hold_frozen", lambda *_: None)
    plain = trained(tmp_path / "plain", *settings)
    assert plain.critic.trunk.layers[0].mlp.up_proj.weight.dtype == torch.float32
    for one, other in zip(held.policy.model.parameters(), plain.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)
