"""Quantiles that cannot cross, from a head's raw outputs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dvpo.core import backends, compiled_rows


def monotone_quantiles(raw: Tensor) -> Tensor:
    """Return the quantiles that a base and the softplus of increments give.

        theta_j = base + (c_j - mean_j c_j) / M,   c_j = sum_{k <= j} softplus(x_k)

    so that `base` is the mean of the law and x its shape.

    Args:
        raw: [..., 1 + M], base and x, in units of the reward; float32 or float64.

    Returns:
        [..., M], ascending; differentiable, in float32 on a CPU once.

    Source: cf. Zhou et al. 2020, non-crossing quantile regression.
    """
    if raw.dtype == torch.float32 and backends.backend(raw) == "compiled":
        quantiles: Tensor = _Compiled.apply(raw)
        return quantiles
    base, shape = raw[..., :1], raw[..., 1:]
    steps = F.softplus(shape).cumsum(dim=-1) / shape.shape[-1]
    return base + steps - steps.mean(dim=-1, keepdim=True)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        ctx.save_for_backward(raw)
        return compiled_rows.monotone_forward(raw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (raw,) = ctx.saved_tensors
        return compiled_rows.monotone_backward(raw, grad)
