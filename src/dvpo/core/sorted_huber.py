"""Sums of the quantile-Huber loss over sorted atoms: value and slope of every prediction, without a [M, L] tensor.

Let P_e be the sum of (theta + e - G)^2 / 2 over the atoms G below theta + e: count, sum and sum of squares of those
atoms are all it takes, that is prefix sums read where theta + e falls among the sorted atoms. Of L atoms, with H of
slope 1 outside a quadratic zone of half-width kappa,

    sum of H over the atoms below theta  =  (P_0 - P_-kappa) / kappa
    sum of H over the atoms above theta  =  (P_kappa - P_0) / kappa  -  L (theta - mean G)  -  L kappa / 2

and the slopes in theta are the same differences of P'_e, the sums of theta + e - G.

Float32 inputs are searched and summed in float64. Both differences cancel digits, R / kappa of them for atoms a
distance R apart: float32 would be left with none at kappa = R / 1e7, float64 still has nine.

This is the form for any device; `core/backends.py` says who does the same faster, and where.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# Predictions worked on at a time: it bounds the memory of the temporaries.
_CHUNK = 2**20


def huber_sums(theta_KNM: Tensor, atoms_KL: Tensor, levels_M: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Return each token's loss by level, [K, M], and the slope of it for each prediction, [K, N, M].

        loss_j = mean_i mean_k rho_tau_j(G_k - theta_ij),    slope_ij = d loss_j / d theta_ij

    Args:
        theta_KNM: predictions, float32 or float64, in any order.
        atoms_KL: targets, sorted.
        levels_M: tau.
        kappa: half-width of the quadratic zone, >= 0 and finite.

    Returns:
        (losses_KM, slopes_KNM) in the predictions' dtype, without gradient.
    """
    num_heads = theta_KNM.shape[1]
    losses_KM, slopes_KNM = torch.empty_like(theta_KNM[:, 0]), torch.empty_like(theta_KNM)
    tau_X = levels_M.double().repeat(num_heads)
    compute = _smooth if kappa > 0 else _pinball
    tokens = max(1, _CHUNK // theta_KNM.shape[1:].numel())
    chunks = (tensor.split(tokens) for tensor in (theta_KNM, atoms_KL, losses_KM, slopes_KNM))
    for theta_CNM, atoms_CL, losses_CM, slopes_CNM in zip(*chunks, strict=True):
        loss_CX, slope_CX = compute(theta_CNM.flatten(1), atoms_CL, tau_X, kappa)
        losses_CM.copy_(loss_CX.view_as(theta_CNM).mean(dim=1))
        slopes_CNM.copy_(slope_CX.view_as(theta_CNM))
    return losses_KM, slopes_KNM.div_(num_heads)


def _smooth(theta_CX: Tensor, atoms_CL: Tensor, tau_X: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    num_atoms = atoms_CL.shape[-1]
    centre_C1 = atoms_CL.mean(dim=-1, keepdim=True, dtype=torch.float64)
    wide_CL, theta_CX = atoms_CL - centre_C1, theta_CX - centre_C1
    # E = 3 X edges. An atom on the wrong side of one by a rounding error adds no more than that error.
    edges_CE = (theta_CX[:, None] + theta_CX.new_tensor([[-kappa], [0.0], [kappa]])).flatten(1)
    count_CE = torch.searchsorted(wide_CL, edges_CE, out_int32=True)
    index_CE = count_CE.long()
    minus_sum_CE = pad(wide_CL.cumsum(dim=-1).neg_(), (1, 0)).gather(-1, index_CE)
    first_CE = torch.addcmul(minus_sum_CE, count_CE.double(), edges_CE)  # P'
    second_CE = pad(wide_CL.square().cumsum_(dim=-1), (1, 0)).gather(-1, index_CE)
    second_CE.addcmul_(edges_CE, minus_sum_CE.add_(first_CE))  # 2 P

    # Where theta lies over an atom, rho weighs 1 - tau; where it lies under one, tau.
    below_CX, above_CX = second_CE.unflatten(1, (3, -1)).diff(dim=1).unbind(dim=1)
    loss_CX = torch.lerp(below_CX, above_CX, tau_X).mul_(0.5 / (kappa * num_atoms))
    loss_CX.addcmul_(theta_CX.add_(kappa / 2), tau_X, value=-1)
    below_CX, above_CX = first_CE.unflatten(1, (3, -1)).diff(dim=1).unbind(dim=1)
    slope_CX = torch.lerp(below_CX, above_CX, tau_X).mul_(1 / (kappa * num_atoms)).sub_(tau_X)
    return loss_CX, slope_CX


def _pinball(theta_CX: Tensor, atoms_CL: Tensor, tau_X: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """kappa = 0: P and its divided difference become P' and the count. Ties count 0, so that they are found exactly."""
    num_atoms = atoms_CL.shape[-1]
    above_CX = theta_CX.nextafter(theta_CX.new_tensor(math.inf))
    counts_CE = torch.searchsorted(atoms_CL, torch.cat([theta_CX, above_CX], dim=-1), out_int32=True)
    below_CX, not_above_CX = counts_CE.chunk(2, dim=-1)
    centre_C1 = atoms_CL.mean(dim=-1, keepdim=True, dtype=torch.float64)
    wide_CL, theta_CX = atoms_CL - centre_C1, theta_CX - centre_C1
    sum_CX = pad(wide_CL.cumsum(dim=-1), (1, 0)).gather(-1, below_CX.long())
    over_CX = (below_CX * theta_CX - sum_CX) / num_atoms
    loss_CX = over_CX - tau_X * theta_CX
    slope_CX = torch.lerp(below_CX.double(), not_above_CX.double() - num_atoms, tau_X) / num_atoms
    return loss_CX, slope_CX
