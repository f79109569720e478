"""The definitions as they read, slow: what the tests and the benchmarks compare with."""

import math

import torch
from torch import Tensor


def naive_quantile_huber_by_level(predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float) -> Tensor:
    """The quantile-Huber loss with the [N, M, L] tensor, mean over heads and atoms."""
    error_NML = targets[..., None, None, :] - predictions[..., None]
    size_NML = error_NML.abs()
    if kappa > 0:
        huber_NML = torch.where(size_NML <= kappa, error_NML**2 / (2 * kappa), size_NML - kappa / 2)
    else:
        huber_NML = size_NML
    loss_NML = (levels[:, None] - (error_NML < 0).to(levels)).abs() * huber_NML
    return loss_NML.mean((-1, -3))


def naive_quantile_huber_loss(
    predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float, level_weights: Tensor | None = None
) -> Tensor:
    losses_M = naive_quantile_huber_by_level(predictions, targets, levels, kappa)
    return (losses_M if level_weights is None else losses_M * level_weights).mean(-1)


def naive_critic_terms(
    predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float, eta: float, alpha: float, beta: float
) -> dict[str, Tensor]:
    """The eight terms by broadcasting and autograd, the pairwise tensor made once for both quantile terms."""
    by_level = naive_quantile_huber_by_level(predictions, targets, levels, kappa)
    theta, atoms = predictions.mean(-2).sort(-1).values, targets.sort(-1).values
    (low, up), (target_low, target_up) = _tails(theta, alpha, beta), _tails(atoms, alpha, beta)
    bend_low, bend_up = _tails((-theta.diff(n=2)).relu(), alpha, beta)
    apart = predictions[..., :, None, :] - predictions[..., None, :, :]
    heads = predictions.shape[-2]
    return {
        "qr": by_level.mean(-1),
        "risk": (by_level * torch.softmax(-eta * levels, dim=-1) * len(levels)).mean(-1),
        "cvar": (low.mean(-1) - target_low.mean(-1)).square(),
        "gain": (up.mean(-1) - target_up.mean(-1)).square(),
        "shift": (atoms.mean(-1) - theta.mean(-1)).relu(),
        "shape": (low.var(-1, correction=0) - target_low.var(-1, correction=0)).relu()
        + (target_up.var(-1, correction=0) - up.var(-1, correction=0)).relu(),
        "curvature": bend_low.mean(-1) + bend_up.mean(-1),
        "consistency": apart.square().mean(-1).sum((-1, -2)) / max(1, heads * (heads - 1)),
    }


def _tails(atoms: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    size = atoms.shape[-1]
    num_low, num_up = (max(1, math.ceil(share * size - 1e-9)) for share in (alpha, beta))
    return atoms[..., :num_low], atoms[..., size - num_up :]


def looped_gae(
    rewards: Tensor,
    quantiles: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    zero_last_delta: Tensor | None = None,
    delta_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Distributional GAE token by token from the end, over masked positions as they come."""
    advantages_BTM = torch.zeros_like(quantiles)
    advantage_BM = torch.zeros_like(quantiles[:, 0])
    next_BM = advantage_BM if bootstrap is None else bootstrap
    unrewarded_B1 = torch.zeros_like(mask[:, :1]) if zero_last_delta is None else zero_last_delta[:, None]
    for t in reversed(range(quantiles.shape[1])):
        policy_B1 = mask[:, t, None]
        delta_BM = rewards[:, t, None] + gamma * next_BM - quantiles[:, t]
        delta_BM = torch.where(unrewarded_B1, 0.0, delta_BM)
        if delta_clip is not None:
            delta_BM = delta_BM.clamp(-delta_clip, delta_clip)
        advantage_BM = torch.where(policy_B1, delta_BM + gamma * lam * advantage_BM, advantage_BM)
        advantages_BTM[:, t] = torch.where(policy_B1, advantage_BM, 0.0)
        next_BM = torch.where(policy_B1, quantiles[:, t], next_BM)
        unrewarded_B1 = unrewarded_B1 & ~policy_B1
    return advantages_BTM, torch.where(mask[..., None], quantiles + advantages_BTM, 0.0)
