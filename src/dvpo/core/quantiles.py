"""Quantile levels, the exact quantile-Huber loss without the [N, M, L] tensor, and the share of crossings."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = (
    1 << 15
)  # predictions worked on at a time: the temporaries stay in the CPU's cache, and memory stays flat


def quantile_levels(
    num_quantiles: int,
    kind: Literal["midpoint", "paper"] = "midpoint",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the M levels at which a critic's quantiles stand.

        midpoint: tau_j = (j - 1/2) / M
        paper:    tau_j = j / M, with tau_M = 1 - 1/(2M), because at level 1 an over-estimate has no gradient

    Args:
        num_quantiles: M >= 1.
        kind: `midpoint` is the grid of least 1-Wasserstein error, `paper` is DVPO's.
        dtype: Floating dtype of the result.
        device: Device of the result.

    Returns:
        [M], increasing, inside (0, 1).

    Raises:
        ValueError: If `num_quantiles` is below 1 or `kind` is unknown.

    Source: Dabney et al. 2018 (arXiv 1710.10044), Lemma 2; DVPO, arXiv 2512.03847.
    """
    if num_quantiles < 1:
        raise ValueError(f"num_quantiles must be at least 1, got {num_quantiles}")
    index_M = torch.arange(1, num_quantiles + 1, dtype=torch.float64, device=device)
    if kind == "midpoint":
        levels_M = (index_M - 0.5) / num_quantiles
    elif kind == "paper":
        levels_M = index_M / num_quantiles
        levels_M[-1] = 1 - 0.5 / num_quantiles
    else:
        raise ValueError(f"kind must be 'midpoint' or 'paper', got {kind!r}")
    return levels_M.to(dtype)


def quantile_huber_loss(
    predictions: Tensor,
    targets: Tensor,
    levels: Tensor,
    kappa: float,
    level_weights: Tensor | None = None,
) -> Tensor:
    by_level = quantile_huber_by_level(predictions, targets, levels, kappa)
    if level_weights is not None:
        by_level = by_level * level_weights.to(by_level.dtype)
    return by_level.mean(-1)


def quantile_huber_by_level(predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float) -> Tensor:
    num_heads, num_quantiles = predictions.shape[-2:]
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    loss_KM = _ExactQuantileHuber.apply(
        predictions.to(dtype).reshape(-1, num_heads, num_quantiles),
        targets.reshape(-1, targets.shape[-1]),
        levels,
        kappa,
    )
    return loss_KM.reshape(*predictions.shape[:-2], num_quantiles)


class _ExactQuantileHuber(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, predictions_KNM: Tensor, targets_KL: Tensor, levels_M: Tensor, kappa: float
    ) -> Tensor:
        _, num_heads, num_quantiles = predictions_KNM.shape
        slope_KNM = torch.empty_like(predictions_KNM)
        loss_KM = predictions_KNM.new_empty(len(predictions_KNM), num_quantiles)
        tokens = max(1, _CHUNK // (num_heads * num_quantiles))
        chunks = (tensor.split(tokens) for tensor in (predictions_KNM, targets_KL, loss_KM, slope_KNM))
        for predictions_CNM, targets_CL, loss_CM, slope_CNM in zip(*chunks, strict=True):
            loss, slope = _loss_and_slope(predictions_CNM, targets_CL, levels_M, kappa)
            loss_CM.copy_(loss)
            slope_CNM.copy_(slope)
        ctx.save_for_backward(slope_KNM)
        return loss_KM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KM: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_KNM,) = ctx.saved_tensors
        return grad_KM[:, None, :] * slope_KNM, None, None, None


def _loss_and_slope(
    predictions_KNM: Tensor, targets_KL: Tensor, levels_M: Tensor, kappa: float
) -> tuple[Tensor, Tensor]:
    _, num_heads, num_quantiles = predictions_KNM.shape
    num_atoms = targets_KL.shape[-1]
    atoms_KL = targets_KL.double()
    centre_K1 = atoms_KL.mean(-1, keepdim=True)
    atoms_KL = (atoms_KL - centre_K1).sort(-1).values
    theta_KX = predictions_KNM.flatten(1).double() - centre_K1

    right = torch.nextafter(theta_KX + kappa, theta_KX.new_tensor(torch.inf))
    edges_KQ = torch.cat([theta_KX - kappa, theta_KX, right], dim=-1)
    counts_KQ = _count_below(atoms_KL, edges_KQ)
    sums = torch.nn.functional.pad(atoms_KL.cumsum(-1), (1, 0))
    squares = torch.nn.functional.pad(atoms_KL.square().cumsum(-1), (1, 0))
    below, at, upto = counts_KQ.double().chunk(3, -1)
    s_below, s_at, s_upto = sums.gather(-1, counts_KQ).chunk(3, -1)
    q_below, q_at, q_upto = squares.gather(-1, counts_KQ).chunk(3, -1)
    inv = 1 / kappa if kappa > 0 else 0.0
    n_lo, s_lo, q_lo = at - below, s_at - s_below, q_at - q_below
    n_up, s_up, q_up = upto - at, s_upto - s_at, q_upto - q_at
    above = num_atoms - upto
    s_above = sums[:, -1:] - s_upto
    over = (
        below * (theta_KX - kappa / 2)
        - s_below
        + (theta_KX * (n_lo * theta_KX - 2 * s_lo) + q_lo) * (inv / 2)
    )
    under = (
        s_above
        - above * (theta_KX + kappa / 2)
        + (theta_KX * (n_up * theta_KX - 2 * s_up) + q_up) * (inv / 2)
    )
    d_over = below + (n_lo * theta_KX - s_lo) * inv
    d_under = above + (s_up - n_up * theta_KX) * inv
    tau = levels_M.double()
    shape = predictions_KNM.shape
    loss = torch.lerp(over.view(shape), under.view(shape), tau).mean(1) / num_atoms
    slope = ((1 - tau) * d_over.view(shape) - tau * d_under.view(shape)) / (num_atoms * num_heads)
    return loss, slope


def _count_below(sorted_KL: Tensor, queries_KQ: Tensor) -> Tensor:
    depth = sorted_KL.shape[-1].bit_length()
    padding = (1 << depth) - 1 - sorted_KL.shape[-1]
    table = torch.nn.functional.pad(sorted_KL, (0, padding), value=torch.inf)
    count = torch.zeros_like(queries_KQ, dtype=torch.int64)
    for level in reversed(range(depth)):
        step = 1 << level
        probe = table[:, step - 1 :].gather(-1, count)
        count.add_(probe < queries_KQ, alpha=step)
    return count


def crossing_share(quantiles: Tensor) -> Tensor:
    if quantiles.shape[-1] < 2:
        return quantiles.new_zeros(quantiles.shape[:-1])
    return (quantiles.diff(dim=-1) < 0).to(quantiles.dtype).mean(-1)
