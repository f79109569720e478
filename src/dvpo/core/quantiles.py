"""Quantile levels, the exact quantile-Huber loss without the [N, M, L] tensor, and the share of crossings."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dvpo.core import backends
from dvpo.core.masks import at_least_float32


def quantile_levels(
    num_quantiles: int,
    kind: Literal["midpoint", "paper"] = "midpoint",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the M levels at which a critic's quantiles stand.

        midpoint: tau_j = (j - 1/2) / M
        paper:    tau_j = j / M, with tau_M = 1 - 1/(2M), because at level 1 an over-estimate has no gradient

    Args:
        num_quantiles: M >= 1.
        kind: `midpoint` is the grid of least 1-Wasserstein error, `paper` is DVPO's.
        dtype: Floating dtype of the result.

    Returns:
        [M], increasing, inside (0, 1).

    Raises:
        ValueError: If `num_quantiles` is below 1 or `kind` is unknown.

    Source: Dabney et al. 2018 (arXiv 1710.10044), Lemma 2; DVPO, arXiv 2512.03847.
    """
    if num_quantiles < 1:
        raise ValueError(f"num_quantiles must be at least 1, got {num_quantiles}")
    index_M = torch.arange(1, num_quantiles + 1, dtype=torch.float64)
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
    """Return each token's quantile-Huber loss, the mean over heads, levels and target atoms.

        rho_tau(u) = |tau - 1{u < 0}| H(u)
        H(u)       = u^2 / (2 kappa) if |u| <= kappa else |u| - kappa / 2;  |u| if kappa = 0
        loss       = mean_i mean_j mean_k  w_j rho_tau_j(G_k - theta_ij)

    Args:
        predictions: theta, [..., N, M] in reward units: N heads, M quantiles, in any order along M.
        targets: G, [..., L] in reward units, in any order; must not require grad.
        levels: tau, [M], inside (0, 1).
        kappa: Half-width of the quadratic zone in reward units, >= 0.
        level_weights: w, [M]; 1 everywhere if None.

    Returns:
        [...], in the predictions' dtype, at least float32; differentiable in `predictions` only, with the
        gradient that `quantile_huber_by_level` states.

    Raises:
        ValueError: If shapes disagree, `targets` requires grad, or `kappa` is negative or not finite.

    Source: Dabney et al. 2018 (arXiv 1710.10044), eq. 10, with H of slope 1; DVPO, arXiv 2512.03847.
    """
    losses = quantile_huber_by_level(predictions, targets, levels, kappa)
    if level_weights is not None:
        if level_weights.shape != levels.shape:
            shapes = f"{tuple(level_weights.shape)} and {tuple(levels.shape)}"
            raise ValueError(f"level_weights and levels must have one shape, got {shapes}")
        losses = losses * level_weights.to(losses)
    return losses.mean(-1)


def quantile_huber_by_level(predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float) -> Tensor:
    """Return each token's quantile-Huber loss level by level, the mean over heads and target atoms.

        loss_j = mean_i mean_k  rho_tau_j(G_k - theta_ij)

    Every weighting of the levels is a mean of these, `(losses * weights).mean(-1)`: one call, which sorts and
    searches once, serves the plain and the risk-weighted term.

    Exact in O((L + N M) log L) time and O(L + N M) memory a token, with a closed-form gradient. If kappa > 0
    the loss is continuously differentiable; if kappa = 0, an atom that ties with a prediction adds 0 to the
    gradient there, which is a subgradient.
    Sums are float64 whatever the inputs (`core/sorted_huber.py` says why): for float32 inputs the loss is that of
    float64 to 3e-7 of its size at any offset of the rewards, and the gradient to 3e-7. Atoms R apart cost the loss
    3e-14 R / kappa of its size, the gradient a hundredth of it. A prediction that lies d from others of its token knows
    its kinks, theta - kappa and theta + kappa, to 2e-7 d: on a CPU up to d = 1,000 kappa (exactly beyond), on a GPU for
    any d.

    Args:
        predictions: theta, [..., N, M] in reward units, in any order along M.
        targets: G, [..., L] in reward units, in any order; must not require grad.
        levels: tau, [M], inside (0, 1).
        kappa: Half-width of the quadratic zone in reward units, >= 0.

    Returns:
        [..., M], in the predictions' dtype, at least float32; differentiable in `predictions` only, once.

    Raises:
        ValueError: If shapes disagree, `targets` requires grad, or `kappa` is negative or not finite.

    Source: as `quantile_huber_loss`; the sorted form is ours.
    """
    check_quantile_shapes(predictions, targets, levels, kappa)
    num_heads, num_quantiles = predictions.shape[-2:]
    losses_KM = _ExactQuantileHuber.apply(
        at_least_float32(predictions).reshape(-1, num_heads, num_quantiles),
        at_least_float32(targets).reshape(-1, targets.shape[-1]),
        levels,
        kappa,
    )
    return losses_KM.view(*predictions.shape[:-2], num_quantiles)


def crossing_share(quantiles: Tensor) -> Tensor:
    """Return the share of neighbouring quantiles that cross.

        mean over j of 1{theta_{j+1} < theta_j}

    Args:
        quantiles: theta, [..., M] in reward units.

    Returns:
        [...], in [0, 1]; 0 if M = 1.

    Raises:
        ValueError: If there is no quantile dimension, or it is empty.
    """
    if quantiles.ndim < 1 or quantiles.shape[-1] < 1:
        raise ValueError(f"quantiles must be [..., M] with M >= 1, got {tuple(quantiles.shape)}")
    return backends.descents(quantiles) / max(1, quantiles.shape[-1] - 1)


def check_quantile_shapes(predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float) -> None:
    """Raise a ValueError unless the arguments of a quantile loss fit each other."""
    sizes = [tuple(tensor.shape) for tensor in (predictions, targets, levels)]
    shapes = "got predictions {}, targets {}, levels {}".format(*sizes)
    if predictions.ndim < 2 or targets.ndim < 1 or predictions.shape[:-2] != targets.shape[:-1]:
        raise ValueError(f"predictions must be [..., N, M] and targets [..., L] with equal leading sizes: {shapes}")
    if levels.shape != predictions.shape[-1:]:
        raise ValueError(f"levels must be [M], the predictions' last size: {shapes}")
    if 0 in (*predictions.shape[-2:], targets.shape[-1]):
        raise ValueError(f"there must be at least one head, one quantile and one target atom: {shapes}")
    if targets.requires_grad:
        raise ValueError("targets must not require grad: the loss is differentiable in the predictions only")
    if not 0 <= kappa < math.inf:
        raise ValueError(f"kappa must be finite and at least 0, got {kappa}")


class _ExactQuantileHuber(torch.autograd.Function):
    """theta [K, N, M], G [K, L] -> losses [K, M]. Forward makes the slopes too: they need the same sums."""

    @staticmethod
    def forward(ctx: Any, theta_KNM: Tensor, atoms_KL: Tensor, levels_M: Tensor, kappa: float) -> Tensor:
        losses_KM, slopes_KNM = backends.huber_sums(theta_KNM, atoms_KL, levels_M, kappa)
        ctx.save_for_backward(slopes_KNM)
        return losses_KM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KM: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes_KNM,) = ctx.saved_tensors
        return grad_KM[:, None] * slopes_KNM, None, None, None
