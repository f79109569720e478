"""Who computes laws and losses where: compiled code on a CPU, a Triton kernel on a GPU, torch anywhere else."""

import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from dvpo.core import compiled_loss, compiling, sorted_huber

CHUNK = 2**24
"""Numbers of which copies are made at a time."""


def backend(tensor: Tensor) -> Literal["compiled", "triton", "torch"]:
    """Chosen by device and dtype alone. A GPU gets Triton where it runs and the numbers are float32."""
    if tensor.device.type == "cpu":
        return "compiled"
    return "triton" if tensor.is_cuda and tensor.dtype == torch.float32 and _triton_runs(tensor.device) else "torch"


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether a first small launch succeeds: Triton needs a C compiler and Python's headers, which images may lack."""
    if importlib.util.find_spec("triton") is None:
        return False
    from dvpo.core import triton_huber

    one_KNM = torch.zeros(1, 1, 1, device=device)
    try:
        triton_huber.huber_sums(one_KNM, one_KNM[0], torch.full((1,), 0.5, device=device), 0.1)
    except Exception as error:  # whatever keeps it from running, torch does it too
        warnings.warn(
            f"Triton does not run here ({error}): the critic's loss is computed by torch, slower", stacklevel=2
        )
        return False
    return True


def huber_sums(theta_KNM: Tensor, atoms_KL: Tensor, levels_M: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """As `dvpo.core.sorted_huber.huber_sums`, with atoms in any order."""
    match backend(theta_KNM):
        case "compiled":
            return compiled_loss.huber_sums(theta_KNM, atoms_KL, levels_M, kappa)
        case "triton":
            from dvpo.core import triton_huber

            return triton_huber.huber_sums(theta_KNM, atoms_KL.sort(dim=-1).values, levels_M, kappa)
        case "torch":
            return sorted_huber.huber_sums(theta_KNM, atoms_KL.sort(dim=-1).values, levels_M, kappa)


def ascending(rows: Tensor) -> Tensor:
    """Each row sorted; NaN comes last. Rows that are sorted already, as a monotone critic's are, cost a look."""
    if rows.requires_grad:
        return rows.sort(dim=-1).values
    if backend(rows) == "compiled":
        return compiling.ascending(rows)
    # Part by part: with what it sorts torch returns the places, which take twice as much.
    made = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part, out in row_parts(rows, made):
        out.copy_(part.sort(dim=-1).values)
    return made


def row_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor [..., M], in parts [K, M] of at most `CHUNK` numbers or one row."""
    size = max(1, CHUNK // max(tensor.shape[-1] for tensor in tensors))
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(size) for tensor in tensors), strict=True)


def descents(rows: Tensor) -> Tensor:
    """How often each row [..., M] goes down from one number to the next: float32 [...]."""
    if backend(rows) == "compiled":
        return compiling.descents(rows)
    return (rows.diff(dim=-1) < 0).sum(-1, dtype=torch.float32)
