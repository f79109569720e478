"""Reductions over processes; each is the identity when there is only one.

Sums over the global batch go through this file and nowhere else, so that a loss, a whitening or a logged mean
does not depend on how many processes share the batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dvpo.errors import InputError

T = TypeVar("T")


def init_from_env(device: str = "cpu", timeout: timedelta | None = None) -> torch.device:
    """Join the process group that `torchrun` describes in the environment; without one, do nothing.

    Args:
        device: `cpu` or `cuda`; under torchrun every process of a machine takes the GPU of its local rank.
        timeout: how long a reduction waits for the slowest process; None: as long as torch pleases.

    Returns:
        The device of this process.
    """
    on_cuda = torch.device(device).type == "cuda"
    if "WORLD_SIZE" not in os.environ:
        if on_cuda and torch.device(device).index is not None:
            torch.cuda.set_device(device)  # what asks for the current GPU shall mean this one
        return torch.device(device)
    if on_cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo stays beside nccl for what lives on the CPU: objects, float64 counts, the norm of offloaded gradients.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
    return torch.device(device)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if is_launched():
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether this process belongs to a group, be it of one."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """The number of processes that share the global batch."""
    return dist.get_world_size() if is_launched() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_launched() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to the terminal."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's `tensor`, the same bits on every process.

    Args:
        tensor: same shape and dtype on every process, without gradient; it is not changed.

    Raises:
        ValueError: if `tensor` requires a gradient, which a reduction would drop without a word.
    """
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum of every process's `tensor`; arguments and errors as for `all_reduce_sum`."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def sum_in_place(tensor: torch.Tensor) -> None:
    """Replace a tensor (gradients, say) by the sum of every process's."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def spread_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by the main process's, without a gradient."""
    if world_size() > 1:
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if tensor.requires_grad:
        raise ValueError(f"a reduction carries no gradient: detach the tensor of shape {tuple(tensor.shape)} first")
    if world_size() == 1:
        return tensor
    reduced = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, operation)
    return reduced


def gather_objects(value: T) -> list[T]:
    """Every process's `value`, ordered by rank, on every process (log rows, RNG states; no large tensors)."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def gather_rows(rows: Iterable[T]) -> list[T]:
    """The rows of all processes, one process's behind the other's, on every process."""
    return [row for own in gather_objects(list(rows)) for row in own]


def share(count: int) -> range:
    """Which of `count` things in a row are this process's: shares follow each other by rank and differ by one at most.

    One after the other they are the whole in its order, so what is gathered needs no sorting.
    """
    size, rest = divmod(count, world_size())
    first = rank() * size + min(rank(), rest)
    return range(first, first + size + (rank() < rest))


def agreed(names: Iterable[str]) -> list[str]:
    """Every process's names, each once, the same list on every process: one may have had nothing to say of some."""
    return list(dict.fromkeys(name for own in gather_objects(list(names)) for name in own))


def before_me(count: int) -> int:
    """The sum of the counts of the processes of lower rank."""
    return sum(gather_objects(count)[: rank()])


def on_main(function: Callable[[], T]) -> T:
    """Let the main process alone do something; every process gets what it returned, or raises what it raised.

    So that nobody waits for a process that has failed, and nobody goes on without it.
    """
    if world_size() == 1:
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome)
    result, failed = outcome[0]
    if failed is not None:
        raise failed
    return result  # type: ignore[return-value]


def together(function: Callable[[], T]) -> T:
    """Let every process do something for itself that may refuse its input; if one is refused, all are.

    The first process alone speaks to the user, and what only another one was told would never be heard.

    Raises:
        InputError: that of the first process which had one.
    """
    refusals: list[InputError] = []
    try:
        result = function()
    except InputError as error:
        refusals.append(error)
    for refusal in gather_rows(refusals):
        raise refusal
    return result


@contextmanager
def main_first() -> Iterator[None]:
    """The main process passes through this block before the others: what it makes there, they find made."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
