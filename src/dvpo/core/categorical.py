"""A law as a histogram over fixed returns: learnt by cross-entropy, read as atoms of equal mass."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from dvpo.core.masks import at_least_float32

REACH = 4.0
"""So many deviations of a smoothed target have their place beyond the outermost return: 3e-5 of its mass is cut."""


def histogram_centres(bins: int, low: float, high: float, sigma: float) -> Tensor:
    """Return where the bins stand: `bins` of them from low to high, and beyond either end room for the smoothing.

        z_r = low + w (r - m),   w = (high - low) / (bins - 1),   m = ceil(4 sigma),   r = 0 ... bins - 1 + 2m

    Without that room a target at an end would be smoothed to one side only and its mean move inwards.

    Args:
        bins: >= 2.
        low: least return, in units of the reward.
        high: greatest return, above `low`.
        sigma: deviation of the smoothing in widths of a bin, > 0.

    Returns:
        [R], float64, increasing; R = bins + 2 ceil(4 sigma).

    Raises:
        ValueError: an argument is out of range.
    """
    if bins < 2 or not low < high or not 0 < sigma < math.inf:
        raise ValueError(f"bins >= 2, low < high and sigma > 0 are needed, got {bins}, {low}, {high} and {sigma}")
    margin = math.ceil(REACH * sigma)
    width = (high - low) / (bins - 1)
    return low + width * torch.arange(-margin, bins + margin, dtype=torch.float64)


def gaussian_histogram(targets: Tensor, centres: Tensor, sigma: float) -> Tensor:
    """Return the bins' shares of a law whose atoms are smoothed by a Gaussian.

        p_r = mean_k [ Phi((z_r + w/2 - G_k) / (sigma w)) - Phi((z_r - w/2 - G_k) / (sigma w)) ] / Z_k

    Z_k is what of atom k's Gaussian falls between the outermost edges.

    Args:
        targets: G, [..., L] in units of the reward, between the ends of the support.
        centres: z, [R], evenly spaced, R >= 2.
        sigma: deviation in widths of a bin, > 0.

    Returns:
        [..., R], summing to 1, without gradient; O(R) memory a token.

    Raises:
        ValueError: shapes or sigma are out of range.

    Source: Imani and White 2018; Farebrother et al. 2024 (arXiv 2403.03950), section 3.1.
    """
    if targets.ndim < 1 or targets.shape[-1] < 1 or centres.ndim != 1 or len(centres) < 2:
        shapes = f"{tuple(targets.shape)} and {tuple(centres.shape)}"
        raise ValueError(f"targets must be [..., L] and centres [R] with R >= 2, got {shapes}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be finite and above 0, got {sigma}")
    targets = at_least_float32(targets).detach()
    centres = centres.to(targets)
    width = (centres[-1] - centres[0]) / (len(centres) - 1)
    edges = torch.cat([centres - width / 2, centres[-1:] + width / 2])
    total = targets.new_zeros(*targets.shape[:-1], len(centres))
    for atom in targets.unbind(dim=-1):
        mass = torch.special.ndtr((edges - atom.unsqueeze(-1)) / (sigma * width)).diff(dim=-1)
        total += mass / mass.sum(dim=-1, keepdim=True)
    return total / targets.shape[-1]


def histogram_loss(logits: Tensor, targets: Tensor, centres: Tensor, sigma: float) -> Tensor:
    """Return each token's cross-entropy to the smoothed target (HL-Gauss), the mean over heads.

        loss = - mean_i sum_r p_r log softmax(x_i)_r,   p of `gaussian_histogram`

    Args:
        logits: x, [..., N, R]; the gradient flows here only: (softmax(x_i) - p) / N.
        targets: G, [..., L] in units of the reward, between the ends of the support.
        centres: z, [R].
        sigma: deviation in widths of a bin, > 0.

    Returns:
        [...] in nats; its least value is the entropy of p, not 0.

    Raises:
        ValueError: shapes or sigma are out of range.

    Source: Farebrother et al. 2024 (arXiv 2403.03950).
    """
    if logits.ndim < 2 or logits.shape[-1:] != centres.shape or logits.shape[:-2] != targets.shape[:-1]:
        shapes = f"{tuple(logits.shape)}, {tuple(targets.shape)}, {tuple(centres.shape)}"
        raise ValueError(f"logits must be [..., N, R], targets [..., L] and centres [R], got {shapes}")
    shares = gaussian_histogram(targets, centres, sigma).unsqueeze(-2)
    return -(shares * at_least_float32(logits).log_softmax(dim=-1)).sum(dim=-1).mean(dim=-1)


def categorical_atoms(probabilities: Tensor, centres: Tensor, num_atoms: int) -> Tensor:
    """Return a histogram's law as M atoms of equal mass: each is the mean of an M-th of its mass.

        theta_j = M * integral of F^{-1}(u) over u from (j-1)/M to j/M

    The mean over j is the law's own mean, and so are the means of all tails whose mass is a multiple of 1/M, which
    quantiles at midpoint levels would only approximate.

    Args:
        probabilities: [..., R], >= 0, summing to 1.
        centres: z, [R], increasing, in units of the reward.
        num_atoms: M >= 1.

    Returns:
        [..., M], increasing along M, in the probabilities' dtype, at least float32.

    Raises:
        ValueError: shapes do not fit, or there is no atom.
    """
    if probabilities.ndim < 1 or probabilities.shape[-1:] != centres.shape:
        shapes = f"{tuple(probabilities.shape)} and {tuple(centres.shape)}"
        raise ValueError(f"probabilities must be [..., R] and centres [R], got {shapes}")
    if num_atoms < 1:
        raise ValueError(f"num_atoms must be at least 1, got {num_atoms}")
    # In float64: an atom is M times a difference of prefix sums.
    wide, places = probabilities.double(), centres.double()
    below = pad(wide.cumsum(dim=-1), (1, 0))
    moment = pad((wide * places).cumsum(dim=-1), (1, 0))
    grid = torch.arange(num_atoms + 1, dtype=torch.float64, device=wide.device) / num_atoms
    mass = (grid * below[..., -1:]).contiguous()  # the probabilities add up to 1 within their own rounding only
    bin_ = torch.searchsorted(below[..., 1:-1].contiguous(), mass)
    integral = moment.gather(-1, bin_) + (mass - below.gather(-1, bin_)) * places[bin_]
    return (integral.diff(dim=-1) * num_atoms).to(at_least_float32(probabilities))
