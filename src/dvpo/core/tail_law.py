"""The critic's tail terms against the law of the return, where one sampled return is all that is known of it."""

import torch
from torch import Tensor

from dvpo.core.masks import at_least_float32
from dvpo.core.terms import tail_size


def law_tail_terms(predictions: Tensor, targets: Tensor, alpha: float, beta: float) -> dict[str, Tensor]:
    """The terms `cvar`, `gain`, `shift` and `shape` with targets that are right on average over the sampled returns.

    A tail's mean is no expectation of a function of the return, but together with the quantile q that bounds it, it
    can be learnt from samples (Fissler and Ziegel 2016): what the quantile Huber loss finds is put in for q, without
    gradient. theta is the mean over heads, sorted; low are its lowest n = ceil(alpha M) atoms, a = n/M their mass,
    q the middle between the atoms n and n + 1 and c = mean low(theta), both without gradient:

        Z = q      + mean_k 1{G_k < q} (G_k - q) / a                                 E[Z] = mean of the lowest mass a
        W = (q-c)^2 + mean_k 1{G_k < q} ((G_k - c)^2 - (q - c)^2) / a                E[W] = its variance

        cvar   ( mean low(theta) - Z )^2
        gain   the same for the highest ceil(beta M) atoms, the law seen from above
        shape  ( var low(theta) - W )^2, and the same above
        shift  ( mean theta - mean G )^2

    If G is drawn from the M atoms of theta, every term's expected gradient is 0; and an error e of q or c moves E[Z]
    and E[W] by the order of e^2 only. `shift` and `shape` lose their one side: the gradient of relu(E[G] - V) is a
    step of an expectation, of which one sample has no unbiased estimate.

    Args:
        predictions: [..., N, M], unsorted, in units of the reward (the gradient flows here only).
        targets: [..., L], in any order.
        alpha: share of the atoms in the lower tail, in [0, 1]; at least one atom is taken.
        beta: share of the atoms in the upper tail, likewise.

    Returns:
        A dict of [...] tensors, float32 or float64. Their least values are the variances of Z, W and G, not 0.

    Raises:
        ValueError: shapes do not fit, or alpha or beta is out of range.

    Source: ours; the score of Fissler and Ziegel 2016 (Annals of Statistics 44), corollary 5.5, with G_2(x) = 2x and
    the quantile held.
    """
    if predictions.dim() < 2 or targets.shape[:-1] != predictions.shape[:-2]:
        shapes = f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"predictions must be [..., N, M] and targets [..., L] with the same ..., got {shapes}")
    for name, share in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    predictions, targets = at_least_float32(predictions), at_least_float32(targets).detach()
    # No term depends on where 0 lies, but far from it float32 has few digits for a difference of means. It is put on a
    # prediction: the targets' mean follows an outlier, far from all the others.
    centre = predictions[..., 0, predictions.shape[-1] // 2, None].detach()
    theta = (predictions - centre.unsqueeze(-1)).mean(dim=-2).sort(dim=-1).values
    targets = targets - centre
    cvar, shape_low = _lower_errors(theta, targets, alpha)
    gain, shape_up = _lower_errors(-theta.flip(-1), -targets, beta)
    return {
        "cvar": cvar.square(),
        "gain": gain.square(),
        "shift": (theta.mean(dim=-1) - targets.mean(dim=-1)).square(),
        "shape": shape_low.square() + shape_up.square(),
    }


def _lower_errors(theta: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """mean low(theta) - Z and var low(theta) - W, both [...], of sorted theta."""
    size = theta.shape[-1]
    count = tail_size(share, size)
    low, mass = theta[..., :count], count / size
    held = theta.detach()
    if count < size:
        bound = (held[..., count - 1] + held[..., count]) / 2
    else:  # all of the law is its tail: nothing lies above
        bound = torch.maximum(held[..., -1], targets.amax(dim=-1))
    centre = held[..., :count].mean(dim=-1)

    def tail_mean(at_targets: Tensor, at_bound: Tensor) -> Tensor:
        """Of a function of the return: what lies above the bound counts as if it stood there."""
        below = (targets < bound.unsqueeze(-1)) * (at_targets - at_bound.unsqueeze(-1))
        return at_bound + below.mean(dim=-1) / mass

    mean = tail_mean(targets, bound)
    variance = tail_mean((targets - centre.unsqueeze(-1)).square(), (bound - centre).square())
    return low.mean(dim=-1) - mean, low.var(dim=-1, correction=0) - variance
