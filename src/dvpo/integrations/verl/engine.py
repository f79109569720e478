"""verl's FSDP2 engine around dvpo's critic: it is loaded, sharded, saved and run here; verl does the rest."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict, get_init_weight_context_manager
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from dvpo.critic import Critic, blank_critic, load_critic
from dvpo.errors import InputError
from dvpo.integrations.verl.objective import Objective, state_places

MODEL_TYPE = "dvpo_critic"
"""Under which verl's worker finds this engine."""
ROW = "dvpo_row"
"""The number of a response within its worker's batch, which goes along when the batch is cut and reordered. What
belongs to a response and has a third dimension is kept by that number and never put into a batch: verl's jagged
tensors of three dimensions are padded wrongly once they are cut."""


class CriticModule(nn.Module):
    """A critic that can be called, sharded and saved as a model of transformers."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        assert critic.trunk is not None
        self.critic = critic
        trunk: Any = critic.trunk
        self.config, self._no_split_modules = trunk.config, trunk._no_split_modules

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, places: Tensor, use_cache: bool
    ) -> Tensor:
        """Predictions [K, N, M] at the given places of the flattened batch; no head reads any other."""
        assert self.critic.trunk is not None
        out = self.critic.trunk(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )
        predictions_KNM: Tensor = self.critic(out.last_hidden_state.flatten(0, 1)[places])
        return predictions_KNM

    def can_generate(self) -> bool:
        return False


@EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device=["cuda", "npu"])
class CriticEngine(FSDPEngineWithLMHead):
    """FSDP2 for the trunk in the compute type that verl is told, and for the heads in float32."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        model, engine = self.model_config, self.engine_config
        unknown = {
            "critic.model.lora_rank": model.lora_rank > 0,
            "critic.model.use_liger": model.use_liger,
            "critic.model.use_fused_kernels": model.use_fused_kernels,
            "critic.model.enable_activation_offload": model.enable_activation_offload,
            "critic.fsdp.ulysses_sequence_parallel_size": engine.ulysses_sequence_parallel_size > 1,
            "critic.fsdp.forward_only": engine.forward_only,
            "critic.fsdp.qat.enable": self._qat_enabled,
        }
        if asked := [name for name, on in unknown.items() if on]:
            raise InputError(f"{asked[0]} is on, which dvpo's critic does not know: leave it off")
        checkpoint: Any = self.checkpoint_config
        self._exports = "hf_model" in checkpoint.save_contents
        # verl would write it as a model of transformers, which a critic with its heads is not.
        saved, loaded = (
            [content for content in contents if content != "hf_model"]
            for contents in (checkpoint.save_contents, checkpoint.load_contents)
        )
        self.checkpoint_config: Any = replace(checkpoint, save_contents=saved, load_contents=loaded)
        self.objective: Objective | None = None
        self.ensembles: dict[int, Tensor] = {}
        """Of the last batch that was evaluated, by row: the mean over heads at each token of the response, [T, M]."""
        self.targets: dict[int, Tensor] = {}
        """Of the batch that is learnt from, by row: target atoms at the policy's tokens, [K, L]."""

    # Made

    def _build_module(self) -> nn.Module:
        folder = Path(self.model_config.local_path)
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype or "fp32")
        # One rank of a shard group reads the weights; the others are sent theirs when the model is cut.
        make = load_critic if self.device_mesh.get_coordinate()[-1] == 0 else blank_critic
        with get_init_weight_context_manager(use_meta_tensor=True, mesh=self.device_mesh)():
            critic = make(
                folder,
                gradient_checkpointing=self.model_config.enable_gradient_checkpointing,
                attention=self.model_config.hf_config._attn_implementation,
            )
        assert critic.trunk is not None
        critic.trunk.to(dtype)
        return CriticModule(critic)

    def _build_fsdp_module(self, module: Any) -> nn.Module:
        engine = self.engine_config
        precision = engine.mixed_precision or {}
        compute = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        reduce = PrecisionType.to_dtype(precision.get("reduce_dtype", "fp32"))
        if compute == torch.float16:
            raise InputError("critic.fsdp.mixed_precision.param_dtype = fp16 would need its loss scaled: take bf16")
        self._autocast_dtype = compute
        offload = CPUOffloadPolicy(pin_memory=True) if engine.offload_policy else None
        if offload is not None:
            self._is_offload_param = self._is_offload_optimizer = False
            self._uses_fsdp2_cpu_offload_policy = True
        state = module.state_dict()
        common: dict[str, Any] = {"mesh": self.device_mesh, "reshard_after_forward": engine.reshard_after_forward}
        common |= {} if offload is None else {"offload_policy": offload}
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        for light in (module.critic.heads, module.critic.verdict):
            if light is not None:
                fully_shard(light, mp_policy=exact, **common)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=True)
        apply_fsdp2(module, {**common, "mp_policy": policy}, engine)
        fsdp2_load_full_state_dict(module, state, self.device_mesh, offload)
        return module

    # Run

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, arguments = super().prepare_model_inputs(micro_batch)
        padded = inputs["attention_mask"] is not None
        inputs["places"] = state_places(
            micro_batch["input_ids"].offsets().diff(),
            micro_batch["responses"].offsets().diff(),
            stride=inputs["input_ids"].shape[1] if padded else None,
        )
        return inputs, arguments

    def prepare_model_outputs(
        self, output: Tensor, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        rows, inputs = micro_batch[ROW].tolist(), micro_batch["input_ids"]
        if self.mode == "train":
            targets_KL = torch.cat([self.targets[row] for row in rows])
            return {"predictions": output, "targets": targets_KL.to(output.device)}
        assert self.objective is not None
        lengths, responses = inputs.offsets().diff(), micro_batch["responses"].offsets().diff()
        ensembles = output.mean(dim=1).cpu().split(responses.tolist())
        self.ensembles |= dict(zip(rows, ensembles, strict=True))
        values = output.new_zeros(len(inputs.values()))
        values[state_places(lengths, responses, stride=None)] = self.objective.values(output).float()
        return {"values": torch.nested.nested_tensor_from_jagged(values, inputs.offsets())}

    # Saved

    def save_checkpoint(self, local_path: str, *arguments: Any, **settings: Any) -> None:
        """verl's own shards; with `hf_model` among the contents also `critic/`, which `dvpo.load_critic` reads."""
        super().save_checkpoint(local_path, *arguments, **settings)
        if self._exports:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(self.module, options=options)
            if self.rank == 0:
                prefix = "critic."
                tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                self.module.critic.save(Path(local_path) / "critic", tensors)
                self.model_config.get_processor().save_pretrained(Path(local_path) / "critic")
            torch.distributed.barrier()
