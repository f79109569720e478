"""The prediction of memory: weights and moments are counted exactly, and each setting moves its own part."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dvpo.config import Config
from dvpo.memory import Prediction, _Case, count_weights, predict
from dvpo.trainer import Trainer
from runs import Parity, model_folder, run_config

ROOT = Path(__file__).resolve().parents[1]
SHAPE = AutoConfig.from_pretrained(model_folder())


def predicted(folder: Path, *overrides: str, on_gpu: bool = False, processes: int = 1) -> Prediction:
    return predict(run_config(folder / "run", *overrides), SHAPE, on_gpu=on_gpu, processes=processes)


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
        assert count_weights(SHAPE).model.number == sum(p.numel() for p in trainer.policy.model.parameters())


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
    assert need.gradients == 4 * count_weights(SHAPE).model.number  # the policy's: the critic's are dropped by then
    assert need.update == need.gradients + need.activations + need.heads + need.rollout


def test_the_larger_of_sampling_and_update_counts_and_not_both(tmp_path: Path):
    small, many = ["sampling.batch_size=1", "evaluation.prompts=1"], ["evaluation.prompts=5000"]
    need = predicted(tmp_path, "algorithm=dvpo", *small)
    assert need.sampling < need.update
    assert need.peak == need.weights + need.moments + need.update
    need = predicted(tmp_path, "algorithm=dvpo", *many, "sampling.batch_size=5000")
    assert need.sampling > need.update
    assert need.peak == need.weights + need.moments + need.sampling
    assert predicted(tmp_path, "sampling.engine=vllm").sampling == 0


def test_what_is_sampled_at_once_holds_its_keys_and_values(tmp_path: Path):
    short = ["evaluation.prompts=64", "sampling.max_prompt_length=24"]
    one, two = (predicted(tmp_path, *short, f"sampling.batch_size={n}").sampling for n in (32, 64))
    # Of a row: 24 + 12 tokens, two layers and one of them once more, keys and values of 2 heads of 8, the queries' 32;
    # and its prompt while that is read (buffers have room for 512 tokens from the start), which is more than logits.
    assert two - one == 32 * (2 * 4 * 36 * (16 * 3 + 32) + 24 * 4 * (4 * 32 + 3 * 64))
    # Longer ones have no buffers for their answers yet while prompts are read; at the end they draw.
    answers = [*short, "sampling.max_completion_length=1000"]
    one, two = (predicted(tmp_path, *answers, f"sampling.batch_size={n}").sampling for n in (32, 64))
    assert two - one == 32 * (2 * 4 * 1024 * (16 * 3 + 32) + 9 * 4 * SHAPE.vocab_size)
    # Five draws a prompt are five rows.
    drawn = predicted(tmp_path, "evaluation.prompts=64", "evaluation.samples=5", "sampling.max_prompt_length=24")
    assert drawn.sampling == predicted(tmp_path, "evaluation.prompts=320", "sampling.max_prompt_length=24").sampling
    # Further turns are read with all that went before; so may those of a task of one's own be.
    long = [*short, "sampling.batch_size=64", "sampling.max_completion_length=200"]
    assert predicted(tmp_path, *long, "task.name=dialogue").sampling > predicted(tmp_path, *long).sampling


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_casts_the_linear_layers_that_learn_and_adapters_cast_none(tmp_path: Path, tied: bool):
    shape = AutoConfig.from_pretrained(model_folder(), tie_word_embeddings=tied)
    config = run_config(tmp_path / "run", "model.dtype=bfloat16", "algorithm=grpo")
    model = AutoModelForCausalLM.from_config(shape)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    need, plain = predict(config, shape), predict(run_config(tmp_path / "run", "algorithm=grpo"), shape)
    assert need.copies == 2 * (linear - head)
    # The head's cast and its gradient in bfloat16 are counted with the logits.
    assert need.heads - plain.heads == 2 * 2 * head
    assert predicted(tmp_path, "algorithm=grpo").copies == 0
    assert predicted(tmp_path, "model.dtype=bfloat16", "model.lora.rank=4").copies == 0


def test_shards_divide_what_lasts_and_gather_what_runs(tmp_path: Path):
    step = ["sampling.prompts_per_step=4", "sampling.samples_per_prompt=2", "algorithm=dvpo", "evaluation.prompts=1"]
    whole = predicted(tmp_path, *step)
    shared = predicted(tmp_path, *step, "distributed.strategy=fsdp", processes=4)
    assert (shared.weights, shared.moments) == (whole.weights // 4, whole.moments // 4)
    assert (shared.gradients, shared.rollout) == (whole.gradients // 4, whole.rollout // 4)
    every = predicted(tmp_path, *step, processes=4)  # ddp: models whole, a quarter of the responses
    assert (every.weights, every.moments, every.rollout) == (whole.weights, whole.moments, whole.rollout // 4)
    # To draw from: the whole policy in the compute type.
    assert shared.sampling == every.sampling + 4 * count_weights(SHAPE).model.number


@pytest.mark.parametrize(("dtype", "root", "size"), [("float32", 4, 4), ("bfloat16", 4, 2)])
def test_a_sharded_critic_gathers_two_layers_and_in_float32_all_else(tmp_path: Path, dtype: str, root: int, size: int):
    sharded = ["algorithm=dvpo", "distributed.strategy=fsdp", f"model.dtype={dtype}", "sampling.prompts_per_step=2"]
    case = _Case(run_config(tmp_path / "run", *sharded), SHAPE, on_gpu=False, processes=2)
    embeddings = SHAPE.vocab_size * 32 + 32  # and the last norm
    layer = case.parts.layer.number
    assert case.parts.trunk.number == embeddings + 2 * layer
    need = case.critic_update()
    gathered = root * embeddings + 2 * size * layer
    added = (root + 4) * embeddings + (size + 4) * layer
    assert need.copies == gathered + max(0, added - need.activations - need.heads)


def test_layers_of_several_sizes_are_counted_one_by_one():
    shape = AutoConfig.for_model(
        "deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=256, moe_intermediate_size=16,
        num_hidden_layers=4, first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    parts = count_weights(shape)
    assert parts.trunk.number - parts.layers.number == 64 * 32 + 32
    assert parts.layer.number < parts.layers.number < 4 * parts.layer.number


def test_offloaded_shares_leave_the_gpu(tmp_path: Path):
    sharded = ["sampling.prompts_per_step=2", "distributed.strategy=fsdp"]
    here = predicted(tmp_path, *sharded, on_gpu=True, processes=2)
    away = predicted(tmp_path, *sharded, "distributed.cpu_offload=true", on_gpu=True, processes=2)
    critics = _Case(run_config(tmp_path / "run", *sharded), SHAPE, on_gpu=True, processes=2).critic_update().gradients
    assert critics > here.gradients  # host memory is that of the larger, wherever the GPU's peak is
    assert away.host == here.weights + here.moments + critics
    assert away.peak == max(here.sampling, here.update - here.gradients)
    assert here.opening == away.opening == 2 * predicted(tmp_path).weights


@pytest.mark.parametrize(("name", "billions"), [("qwen3_8b", 8.2), ("qwen3_1_7b", 1.7)])
def test_the_shipped_shapes_are_those_of_the_models_they_name(name: str, billions: float):
    shape = AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / name)
    assert round(count_weights(shape).model.number / 1e9, 1) == billions
