"""The prediction of memory: weights and moments are counted exactly, and each setting moves its own part."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from dvpo.config import Config
from dvpo.memory import Prediction, parameters_of, predict
from dvpo.trainer import Trainer
from runs import Parity, model_folder, run_config

SHAPE = AutoConfig.from_pretrained(model_folder())


def predicted(folder: Path, *overrides: str) -> Prediction:
    return predict(run_config(folder / "run", *overrides), SHAPE)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=dvpo"],
        ["algorithm=ppo", "actor.kl.coef=0.1"],
        ["algorithm=grpo"],
        ["algorithm=dvpo", "critic.trunk=frozen"],
        ["algorithm=ppo", "critic.trunk=shared"],
        ["model.lora.rank=4", "actor.kl.coef=0.1"],
        ["model.lora.rank=4", "model.lora.targets=[q_proj]", "critic.lora.rank=2"],
        ["model.lora.rank=4", "critic.lora.rank=0", "algorithm=ppo"],
        ["model.lora.rank=4", "critic.trunk=frozen"],
        ["model.lora.rank=4", "algorithm=grpo"],
        ["model.dtype=bfloat16", "actor.kl.coef=0.1", "algorithm=dvpo"],
        ["model.dtype=bfloat16", "actor.kl.coef=0.1", "algorithm=dvpo", "critic.trunk=frozen"],
        ["model.dtype=bfloat16", "model.lora.rank=4", "actor.kl.coef=0.1"],
        ["model.dtype=bfloat16", "model.lora.rank=4", "critic.lora.rank=0", "algorithm=ppo"],
    ],
)
def test_weights_and_moments_are_those_of_the_models_that_a_run_holds(tmp_path: Path, overrides: list[str]):
    config: Config = run_config(tmp_path / "run", *overrides)
    trainer = Trainer(config, task=Parity())
    trainer.close()
    reference = trainer.reference and trainer.reference.model
    modules = [part for part in (trainer.policy.model, trainer.critic, reference) if part is not None]
    held = {id(p): p for module in modules for p in module.parameters()}.values()  # what is shared is held once
    learning = [p for o in (trainer.policy_optimiser, trainer.critic_optimiser) if o for p in o.parameters]
    need = predict(config, SHAPE)
    assert need.weights == sum(p.nbytes for p in held)
    assert need.moments == 8 * sum(p.numel() for p in learning)
    if not config.model.lora.rank:
        assert parameters_of(SHAPE).model == sum(p.numel() for p in trainer.policy.model.parameters())


def test_each_setting_moves_its_own_part(tmp_path: Path):
    plain = predicted(tmp_path)
    assert predicted(tmp_path, "update.microbatch_size=1").activations == plain.activations / 3  # of 3 rows
    assert predicted(tmp_path, "model.gradient_checkpointing=true").activations < plain.activations
    assert predicted(tmp_path, "model.dtype=bfloat16").activations < plain.activations
    assert predicted(tmp_path, "critic.num_quantiles=200").rollout == 25 * plain.rollout  # 200 / 8
    longer = predicted(tmp_path, "sampling.max_completion_length=24")
    assert longer.rollout == 2 * plain.rollout
    assert (longer.weights, longer.moments) == (plain.weights, plain.moments)
    assert predict(run_config(tmp_path / "run"), SHAPE, base=10**6).peak == plain.peak + 10**6


def test_adapters_alone_have_gradients(tmp_path: Path):
    need = predicted(tmp_path, "model.lora.rank=4")
    # Of either of two layers: q, k, v, o, gate, up, down.
    inputs_and_outputs = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 64) + (64 + 32))
    assert need.gradients == 4 * 4 * inputs_and_outputs
    assert need.gradients < predicted(tmp_path).gradients / 4


def test_the_larger_of_the_two_updates_counts_and_not_both(tmp_path: Path):
    need = predicted(tmp_path)
    assert need.gradients == 4 * parameters_of(SHAPE).model  # the policy's: the critic's are dropped by then
    assert need.peak == sum(getattr(need, part) for part in need.__dataclass_fields__)
