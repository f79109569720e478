"""Critic workers of verl as its trainer starts them, and a rollout of ours in verl's shape."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

from dvpo.batch import Rollout
from dvpo.integrations.verl.objective import Objective
from dvpo.integrations.verl.worker import CriticLoss, CriticWorker

CONTENTS = ["model", "optimizer", "extra"]


HOW = {
    "use_remove_padding": False,
    "use_dynamic_bsz": False,
    "micro_batch_size_per_gpu": 2,
    "max_token_len_per_gpu": 4096,
}
"""How a batch is cut, unless a test says otherwise: verl takes it from the batch before it looks at its config."""


@contextmanager
def critic_workers(
    folder: Path, objective: Objective, ranks: int, optimiser: Mapping[str, Any], precision: str = "fp32", **model: Any
) -> Iterator[RayWorkerGroup]:
    """A group of real Ray actors around the critic in `folder`, killed at the end; `group.reset()` reads it anew."""
    config = TrainingWorkerConfig(
        model_type="value_model",
        model_config=HFModelConfig(
            path=str(folder),
            override_config={"attn_implementation": "sdpa"},
            **{"enable_gradient_checkpointing": False, "use_remove_padding": False, **model},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32"},
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(total_training_steps=10, **optimiser),
        checkpoint_config=CheckpointConfig(save_contents=[*CONTENTS, "hf_model"], load_contents=CONTENTS),
    )
    pool = RayResourcePool([ranks], max_colocate_count=1)
    maker = RayClassWithInitArgs(cls=ray.remote(CriticWorker), config=config)
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=maker, device_name="cpu")
    try:
        assert group.world_size == ranks
        group.reset()
        group.set_loss_fn(CriticLoss(objective))
        yield group
    finally:
        for worker in group.workers:
            ray.kill(worker)
        for placed in pool.get_placement_groups(device_name="cpu"):
            ray.util.remove_placement_group(placed)


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def as_verl_has_it(rollout: Rollout) -> dict[str, Tensor]:
    """Rows of prompt and response without padding, as verl's TransferQueue hands them to a worker."""
    attention_BS, width = rollout.attention_BS, rollout.prompt_length
    fields: dict[str, list[Tensor]] = {}
    for row, tokens_S in enumerate(rollout.tokens_BS):
        prompt = tokens_S[:width][attention_BS[row, :width]]
        there_T = attention_BS[row, width:]
        response = tokens_S[width:][there_T]
        made = {
            "prompts": prompt,
            "responses": response,
            "input_ids": torch.cat([prompt, response]),
            "position_ids": torch.arange(len(prompt) + len(response)),
            "response_mask": rollout.mask_BT[row][there_T].long(),
            "loss_mask": rollout.mask_BT[row][there_T].long(),
            "rm_scores": rollout.rewards_BT[row][there_T],
        }
        for name, tensor in made.items():
            fields.setdefault(name, []).append(tensor)
    return {name: nested(tensors) for name, tensors in fields.items()}


def values_of(group: RayWorkerGroup, batch: Mapping[str, Tensor], **how: Any) -> list[Tensor]:
    """What verl's trainer asks first: a value at every token, prompts among them, [S] a row."""
    output = group.infer_batch(packed(batch, compute_loss=False, **{**HOW, **how})).get()
    return list(output["values"].unbind())


def learn(group: RayWorkerGroup, batch: Mapping[str, Tensor], epochs: int = 1, **how: Any) -> dict[str, Any]:
    """What it asks then: one mini-batch an epoch; the worker's metrics, a list entry or a number an update."""
    size, order = len(batch["input_ids"]), {"shuffle": False}
    asked = {"mini_batch_size": size, "global_batch_size": size, "epochs": epochs, "seed": 1}
    output = group.train_mini_batch(packed(batch, dataloader_kwargs=order, **asked, **{**HOW, **how})).get()
    metrics: dict[str, Any] = tensordict_utils.get(output, "metrics")
    return metrics


def packed(batch: Mapping[str, Tensor], **told: Any) -> TensorDict:
    lengths = batch["input_ids"].offsets().diff().tolist()
    return tensordict_utils.get_tensordict(dict(batch), {"temperature": 1.0, "global_token_num": lengths, **told})
