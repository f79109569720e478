"""The quantile-Huber loss as its formula reads, with the [N, M, L] tensor: the reference of tests and benchmark."""

import torch
from torch import Tensor


def naive_quantile_huber_loss(
    predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float, level_weights: Tensor | None = None
) -> Tensor:
    error_NML = targets[..., None, None, :] - predictions[..., None]
    size_NML = error_NML.abs()
    if kappa > 0:
        huber_NML = torch.where(size_NML <= kappa, error_NML**2 / (2 * kappa), size_NML - kappa / 2)
    else:
        huber_NML = size_NML
    loss_NML = (levels[:, None] - (error_NML < 0).to(levels)).abs() * huber_NML
    if level_weights is not None:
        loss_NML = loss_NML * level_weights[:, None]
    return loss_NML.mean((-1, -2, -3))
