"""Who computes laws and losses where: compiled code on a CPU, a Triton kernel on a GPU, torch anywhere else."""

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from dvpo.core import compiled_loss, compiling, sorted_huber


def backend(tensor: Tensor) -> Literal["compiled", "triton", "torch"]:
    """Chosen by device and dtype alone. A GPU gets Triton where it is installed and the numbers are float32."""
    if tensor.device.type == "cpu":
        return "compiled"
    return "triton" if tensor.is_cuda and tensor.dtype == torch.float32 and _has_triton() else "torch"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


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
    by_look = backend(rows) == "compiled" and not rows.requires_grad
    return compiling.ascending(rows) if by_look else rows.sort(dim=-1).values


def descents(rows: Tensor) -> Tensor:
    """How often each row [..., M] goes down from one number to the next: float32 [...]."""
    if backend(rows) == "compiled":
        return compiling.descents(rows)
    return (rows.diff(dim=-1) < 0).sum(-1, dtype=torch.float32)
