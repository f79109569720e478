"""Quantile levels, the exact quantile-Huber loss without the [N, M, L] tensor, and the share of crossings."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from dvpo.core.masks import at_least_float32

# Predictions worked on at a time: on a CPU the temporaries stay in the cache; elsewhere only memory counts.
_CHUNK_CPU, _CHUNK_ELSEWHERE = 2**14, 2**20


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
    Sums are float64 whatever the inputs: float32 ones would cancel for small kappa and for atoms far apart.

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
    _check(predictions, targets, levels, kappa)
    num_heads, num_quantiles = predictions.shape[-2:]
    losses_KM = _ExactQuantileHuber.apply(
        at_least_float32(predictions).reshape(-1, num_heads, num_quantiles),
        targets.reshape(-1, targets.shape[-1]),
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
    crossed = quantiles.diff(dim=-1) < 0
    return crossed.sum(-1, dtype=torch.float32) / max(1, crossed.shape[-1])


def _check(predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float) -> None:
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
        losses_KM = torch.empty_like(theta_KNM[:, 0])
        slopes_KNM = torch.empty_like(theta_KNM)
        chunk = _CHUNK_CPU if theta_KNM.device.type == "cpu" else _CHUNK_ELSEWHERE
        tokens = max(1, chunk // theta_KNM.shape[1:].numel())
        chunks = (tensor.split(tokens) for tensor in (theta_KNM, atoms_KL, losses_KM, slopes_KNM))
        for theta_CNM, atoms_CL, losses_CM, slopes_CNM in zip(*chunks, strict=True):
            loss_CNM, slope_CNM = _loss_and_slope(theta_CNM.double(), atoms_CL.double(), levels_M.double(), kappa)
            losses_CM.copy_(loss_CNM.mean(1))
            slopes_CNM.copy_(slope_CNM / theta_CNM.shape[1])
        ctx.save_for_backward(slopes_KNM)
        return losses_KM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KM: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes_KNM,) = ctx.saved_tensors
        return grad_KM[:, None] * slopes_KNM, None, None, None


def _loss_and_slope(theta_CNM: Tensor, atoms_CL: Tensor, levels_M: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Return the mean of rho_tau(G - theta) over the atoms and its derivative in theta, both [C, N, M].

    As seen from a prediction, three edges part the sorted atoms:

        far below | theta - kappa | near below | theta | near above | theta + kappa | far above

    H is linear in the far parts and quadratic in the near ones, so the number, sum and sum of squares of the
    atoms before each edge are all it takes: prefix sums, read where the edges fall. X = N M, E = 3 X.
    """
    num_atoms = atoms_CL.shape[-1]
    atoms_CL = atoms_CL.sort(-1).values
    theta_C1X = theta_CNM.flatten(1)[:, None]
    # Searched before centring, which rounds, so that ties are exact.
    edges_C3X = theta_C1X + theta_C1X.new_tensor([[-kappa], [0.0], [kappa]])
    if kappa == 0:  # all edges would stand at theta: ties go between the first and the last
        edges_C3X[:, 2].nextafter_(edges_C3X.new_tensor(math.inf))
    count_CE = _count_below(atoms_CL, edges_C3X.flatten(1))

    centre_C1 = atoms_CL.mean(-1, keepdim=True)
    atoms_CL = atoms_CL - centre_C1
    theta_C1X = theta_C1X - centre_C1[:, None]
    count_C3X, index_CE = count_CE.double().view_as(edges_C3X), count_CE.long()
    minus_sum_C3X = pad(-atoms_CL.cumsum(-1), (1, 0)).gather(-1, index_CE).view_as(edges_C3X)
    squares_C3X = pad(atoms_CL.square().cumsum(-1), (1, 0)).gather(-1, index_CE).view_as(edges_C3X)
    # Sums of theta - G and of (theta - G)^2 over the atoms before each edge.
    first_C3X = torch.addcmul(minus_sum_C3X, theta_C1X, count_C3X)
    second_C3X = torch.addcmul(squares_C3X, theta_C1X, first_C3X + minus_sum_C3X)

    per_kappa = 1 / kappa if kappa > 0 else 0.0  # at kappa = 0 only ties are near, and they count 0
    near_below_CX, near_above_CX = second_C3X.diff(dim=1).mul_(per_kappa / 2).unbind(1)
    near_below_slope_CX, near_above_slope_CX = first_C3X.diff(dim=1).mul_(per_kappa).unbind(1)
    far_below_CX, far_above_CX = count_C3X[:, 0], num_atoms - count_C3X[:, 2]
    over_CX = near_below_CX + first_C3X[:, 0] - far_below_CX * (kappa / 2)
    under_CX = near_above_CX + first_C3X[:, 2] - num_atoms * theta_C1X[:, 0] - far_above_CX * (kappa / 2)

    # Where theta lies over an atom, rho weighs 1 - tau; where it lies under one, tau.
    tau_X = levels_M.repeat(theta_CNM.shape[1])
    losses_CX = torch.lerp(over_CX, under_CX, tau_X) / num_atoms
    over_slope_CX, under_slope_CX = near_below_slope_CX + far_below_CX, near_above_slope_CX - far_above_CX
    slopes_CX = torch.lerp(over_slope_CX, under_slope_CX, tau_X) / num_atoms
    return losses_CX.view_as(theta_CNM), slopes_CX.view_as(theta_CNM)


def _count_below(sorted_CL: Tensor, queries_CE: Tensor) -> Tensor:
    """Return how many entries of each sorted row are below each query, int32.

    All queries take the steps of a binary search together. `torch.searchsorted` is four times slower on a CPU,
    where its branches are mispredicted unless the queries happen to be sorted.
    """
    depth = sorted_CL.shape[-1].bit_length()
    table = pad(sorted_CL, (0, 2**depth - 1 - sorted_CL.shape[-1]), value=math.inf)
    count_CE = torch.zeros_like(queries_CE, dtype=torch.int32)
    for step in (2**k for k in reversed(range(depth))):
        probe_CE = table[:, step - 1 :].gather(-1, count_CE.long())
        count_CE.add_(probe_CE.lt_(queries_CE).int(), alpha=step)  # lt_ and int are vectorised, lt is not
    return count_CE
