"""Models on several processes: every process holds them whole (`ddp`), or its share of every weight (`fsdp`).

Whole models need one thing only: that gradients are added up before an optimiser step. That is done here and not by
torch's DDP, which wants one forward and one backward pass a step, through the module it wraps. Here a minibatch has
several micro-batches, and on some processes more of them than on others; a policy is asked for hidden states and for
logits of some of them; a prompt and its responses are two passes. And as every loss is divided by the denominator of
the whole batch, gradients are to be added, not averaged.

Shared weights are torch's FSDP2 (`fully_shard`): a layer's weights are gathered when it runs and dropped behind it. Its
hooks sit on modules, so whatever uses a sharded model's weights runs `inside` it, and every process must do that as
often as all others.
"""

import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from dvpo.config import Config
from dvpo.distributed import all_reduce_max, is_launched, is_main, sum_in_place, world_size
from dvpo.errors import InputError

T = TypeVar("T")
BUCKET = 1 << 24
"""Numbers that are added up in one reduction."""
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name of it


# What is possible


def refuse_processes(config: Config) -> None:
    """Check that a run can be shared by the processes that there are.

    Raises:
        InputError: as `refuse_sharing`; sharding without torchrun.
    """
    refuse_sharing(config, world_size())
    if config.distributed.strategy == "fsdp" and not is_launched():
        raise InputError(
            "distributed.strategy = fsdp shards models over processes that torchrun starts: run `torchrun "
            "--nproc-per-node N -m dvpo train ...`, or set it to ddp"
        )


def refuse_sharing(config: Config, processes: int) -> None:
    """Check that a run can be shared by so many processes.

    Raises:
        InputError: fewer prompts a step than processes, a setting that is for one process.
    """
    prompts = config.sampling.prompts_per_step
    if prompts < processes:
        raise InputError(
            f"sampling.prompts_per_step = {prompts} is less than the {processes} processes, and each needs one: "
            "raise it, or start fewer processes"
        )
    alone = processes == 1 and config.distributed.strategy == "ddp"
    if config.sampling.engine == "vllm" and not alone:
        raise InputError(
            "sampling.engine = vllm gives a server the weights of one process that has them whole: set it to "
            "transformers, or start one process with distributed.strategy=ddp"
        )
    if config.critic.replay and processes > 1:
        raise InputError(
            f"critic.replay = {config.critic.replay} keeps responses on one process, and there are {processes}: "
            "set it to 0, or start one process"
        )


# Whole models


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients; what has none anywhere keeps none.

    Sharded parameters are left alone: FSDP has added theirs during the backward pass.
    """
    if world_size() == 1 or not parameters or isinstance(parameters[0], DTensor):
        return
    present = all_reduce_max(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32))
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in [p for p, there in zip(parameters, present.tolist(), strict=True) if there]:
        bucket.append(parameter)
        held += parameter.numel()
        if held >= BUCKET:
            _add(bucket)
            bucket, held = [], 0
    if bucket:
        _add(bucket)


def _add(bucket: Sequence[nn.Parameter]) -> None:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
    sum_in_place(flat)
    for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad = piece.view_as(parameter)


# Sharded models


def shard(module: nn.Module, device: torch.device, dtype: torch.dtype, cpu_offload: bool, root_dtype: bool) -> None:
    """Leave each process its share of a module's weights; the module's class changes in place.

    Args:
        module: a model with whole weights, equal on all processes. Its layers (`_no_split_modules` of transformers) are
            gathered one at a time, the rest together.
        device: where it computes.
        dtype: what weights are gathered in, `float32` or `bfloat16`; shares, gradients and moments are float32.
        cpu_offload: shares, gradients and moments live in host memory.
        root_dtype: whether that holds for what is outside the layers as well; not where heads are to be float32.
    """
    # Outputs that are views, a prediction's quantiles say, are nowhere changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size(),))
    low = None if dtype is torch.float32 else dtype
    mixed = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for layer in layers_of(module):
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    policy = mixed if root_dtype else plain
    # True: what a pass without gradient gathered would be stale behind the next optimiser step.
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # A sum: losses are divided by the whole batch already. Forced, since gloo knows no scaled one.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    for part in module.modules():
        part.is_sharded = True  # type: ignore[assignment]
    module._is_inside = False  # type: ignore[assignment]
    module.run_inside = MethodType(_run, module)  # type: ignore[assignment]
    register_fsdp_forward_method(module, "run_inside")


def _run(module: nn.Module, function: Callable[[], Any]) -> Any:
    return function()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, which are gathered one at a time."""
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds but a share of the weights of a module or of its layers."""
    return getattr(module, "is_sharded", False)


def inside(module: nn.Module, function: Callable[[], T]) -> T:
    """Call a function that uses a module's weights; those of a sharded module are gathered for it.

    What the function returns are the tensors that gradients come back through.
    """
    if not hasattr(module, "run_inside") or module._is_inside:
        return function()
    module._is_inside = True  # type: ignore[assignment]
    try:
        return module.run_inside(function)  # type: ignore[operator]
    finally:
        module._is_inside = False  # type: ignore[assignment]


def idle_passes(passes: int, module: nn.Module) -> int:
    """How many passes more another process makes: a sharded module must be run as often by all of them."""
    if not is_sharded(module):
        return 0
    return int(all_reduce_max(torch.tensor(passes))) - passes


def gathered(share: DTensor) -> Tensor:
    """The whole of a tensor whose rows are shared by all processes, without a gradient; every process must come here.

    Not `full_tensor`: gloo's two worker threads (torch 2.13) note the name of the last operation without a lock, and
    that of its gathering, ALLGATHER_COALESCED, is too long to be stored in place: both may free the one before. A heap
    so damaged ended processes by SIGSEGV (docs/log.md). Names of up to 15 letters do no harm.
    """
    own, count = share.to_local().detach(), share.shape[0]
    rows = -(-count // world_size())  # of all but the last processes, which may have fewer or none
    padded = own.new_zeros(rows, *share.shape[1:])
    padded[: len(own)] = own
    full = own.new_empty(rows * world_size(), *share.shape[1:])
    all_gather_single(full, padded)
    return full[:count]


# State


def whole(value: Any) -> Any:
    """Nested values with whole tensors on the CPU in place of shared ones; only the main process keeps them.

    Every process must come here with the same structure.
    """
    if isinstance(value, DTensor):
        share: Any = value.to(value.device_mesh.device_type)  # one in host memory is gathered by way of the device
        full = gathered(share)
        return full.cpu() if is_main() else full.new_empty(0)
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, whole and on the CPU where it was sharded; every process must come here."""
    state = module.state_dict(keep_vars=True)
    made = {id(tensor): whole(tensor) for tensor in state.values()}  # tied weights stay one tensor
    return {name: made[id(tensor)].detach() for name, tensor in state.items()}


def shared_like(value: Any, parameter: nn.Parameter) -> Any:
    """This process's share of a whole tensor that belongs to a sharded parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    share = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return share.to(parameter.device)  # it comes to lie on the mesh's device, also where shares stay in host memory


def all_finite(modules: Sequence[nn.Module]) -> bool:
    """Whether every weight of every process is finite."""
    own = (p.to_local() if isinstance(p, DTensor) else p for module in modules for p in module.parameters())
    return not int(all_reduce_max(torch.tensor(int(not all(bool(p.isfinite().all()) for p in own)))))
