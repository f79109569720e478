"""Looking at parts of a law: the terms of the critic's loss, risk functionals, the rank advantage, denoising.

A law is given by M atoms of equal mass along the last dimension. Two conventions meet here and must not be
mixed: the tails of the *critic's terms* are whole atoms (the lowest ceil(alpha M)), while the *risk
functionals* split an atom exactly when a mass is no multiple of 1/M.
"""

import math

import torch
from torch import Tensor

from dvpo.core import compiled_ranks
from dvpo.core.backends import ascending, backend, row_parts
from dvpo.core.masks import at_least_float32
from dvpo.core.quantiles import check_quantile_shapes
from dvpo.core.terms import fused_terms

# The critic's loss


def critic_terms(
    predictions: Tensor,
    targets: Tensor,
    levels: Tensor,
    kappa: float,
    eta: float,
    alpha: float,
    beta: float,
) -> dict[str, Tensor]:
    """Every term of the distributional critic's loss, each before its weight; L = qr + sum_x weight_x * x.

    theta_ij is head i's prediction, theta_j the mean over heads sorted along j, G_k the sorted target atoms,
    and low / up are the lowest ceil(alpha n) / highest ceil(beta n) of n atoms:

        qr           mean_ijk rho_tau_j(G_k - theta_ij), the quantile Huber loss of every head
        risk         the same, level j weighted by exp(-eta tau_j) / mean_j exp(-eta tau_j)
        cvar         ( mean low(theta) - mean low(G) )^2
        gain         ( mean up(theta) - mean up(G) )^2
        shift        relu( mean G - mean theta )
        shape        relu( var low(theta) - var low(G) ) + relu( var up(G) - var up(theta) )
        curvature    mean over low(D) of relu(-D_j) + mean over up(D) of relu(-D_j), second differences
                     D_j = theta_{j+1} - 2 theta_j + theta_{j-1} in the order of j; 0 if M < 3
        consistency  mean over head pairs and j of (theta_ij - theta_i'j)^2; 0 if N = 1

    Args:
        predictions: [..., N, M], unsorted, in units of the reward (the gradient flows here only).
        targets: [..., L], in any order.
        levels: [M], tau_j in (0, 1).
        kappa: >= 0, half the quadratic zone of the Huber function, in units of the reward.
        eta: how much more the lower levels weigh in `risk`.
        alpha: share of the atoms in the lower tail, in [0, 1]; at least one atom is taken.
        beta: share of the atoms in the upper tail, likewise.

    Returns:
        A dict of [...] tensors in the order above, float32 or float64; differentiable once. A term that the loss
        leaves out costs nothing in the backward pass.

    Raises:
        ValueError: shapes do not fit, or alpha, beta or eta is out of range.

    Source: DVPO, arXiv 2512.03847; quantile Huber loss of Dabney et al. 2018.
    """
    _check_share("alpha", alpha)
    _check_share("beta", beta)
    _check_finite("eta", eta)
    predictions, targets = at_least_float32(predictions), at_least_float32(targets).detach()
    check_quantile_shapes(predictions, targets, levels, kappa)
    return fused_terms(predictions, targets, levels, kappa, eta, alpha, beta)


# Risk functionals. Each is a weighting of the sorted atoms, sum_j w_j theta_(j) with sum_j w_j = 1 (a
# spectral value), so one function evaluates them all. A scalar advantage under one of them is ordinary GAE on
# that value: gae(rewards, spectral_value(quantiles, weights), ...).


def spectral_value(atoms: Tensor, weights: Tensor) -> Tensor:
    """Weigh the sorted atoms of a law, sum_j w_j theta_(j).

    Args:
        atoms: [..., M], in any order.
        weights: [M], of the lowest atom first.

    Returns:
        [...], float32 or float64.

    Raises:
        ValueError: there is not one weight per atom.

    Source: Acerbi 2002.
    """
    if atoms.dim() < 1 or weights.shape != atoms.shape[-1:]:
        raise ValueError(f"weights must be [M] for atoms [..., M], got {tuple(weights.shape)}, {tuple(atoms.shape)}")
    sorted_atoms = ascending(at_least_float32(atoms))
    return sorted_atoms @ weights.to(sorted_atoms)


def cvar(atoms: Tensor, alpha: float) -> Tensor:
    """Mean of the lowest mass alpha; the minimum for alpha = 0, the mean for alpha = 1.

    Args:
        atoms: [..., M], in any order.
        alpha: in [0, 1].

    Returns:
        [...].

    Raises:
        ValueError: alpha is out of range.

    Source: Rockafellar and Uryasev 2000.
    """
    return spectral_value(atoms, cvar_weights(atoms.shape[-1], alpha))


def upper_mean(atoms: Tensor, beta: float) -> Tensor:
    """Mean of the highest mass beta; the maximum for beta = 0, the mean for beta = 1.

    Args, Returns, Raises: as `cvar`.
    """
    return spectral_value(atoms, upper_weights(atoms.shape[-1], beta))


def trimmed_mean(atoms: Tensor, lo: float, hi: float) -> Tensor:
    """Mean of the mass between lo and 1 - hi.

    With a binary reward observed through false-negative rate lo and false-positive rate hi, the trimmed mean
    of the observed law is the true success probability (noise-matched trimming).

    Args:
        atoms: [..., M], in any order.
        lo: mass dropped below, >= 0.
        hi: mass dropped above, >= 0; lo + hi < 1.

    Returns:
        [...].

    Raises:
        ValueError: lo or hi is out of range.
    """
    return spectral_value(atoms, trimmed_weights(atoms.shape[-1], lo, hi))


def wang(atoms: Tensor, eta: float) -> Tensor:
    """Mean under Wang's distortion, w_j = Phi(Phi^-1(j/M) + eta) - Phi(Phi^-1((j-1)/M) + eta).

    Args:
        atoms: [..., M], in any order.
        eta: > 0 pessimistic, 0 the mean, < 0 optimistic; finite.

    Returns:
        [...].

    Raises:
        ValueError: eta is not finite.

    Source: Wang 2000.
    """
    return spectral_value(atoms, wang_weights(atoms.shape[-1], eta))


def tv_worst_case(atoms: Tensor, rho: float) -> Tensor:
    """The lowest mean among the laws on the same atoms within total variation rho (half the L1 distance).

    It is reached by taking the top rho of the mass away and putting it on the minimum.

    Args:
        atoms: [..., M], in any order.
        rho: in [0, 1]; 0 is the mean, 1 the minimum.

    Returns:
        [...].

    Raises:
        ValueError: rho is out of range.

    Source: as in RFQI, Panaganti et al. 2022, here over the law of the return.
    """
    return spectral_value(atoms, tv_weights(atoms.shape[-1], rho))


def cvar_weights(num_atoms: int, alpha: float) -> Tensor:
    """The weights [M], float64, of `cvar`."""
    _check_share("alpha", alpha)
    mass = _mass_between(num_atoms, 0.0, alpha)
    return mass / alpha if alpha > 0 else _lowest_atom(num_atoms)


def upper_weights(num_atoms: int, beta: float) -> Tensor:
    """The weights [M], float64, of `upper_mean`: `cvar` seen from above."""
    _check_share("beta", beta)
    return cvar_weights(num_atoms, beta).flip(0)


def trimmed_weights(num_atoms: int, lo: float, hi: float) -> Tensor:
    """The weights [M], float64, of `trimmed_mean`."""
    _check_rates("lo", lo, "hi", hi)
    return _mass_between(num_atoms, lo, 1.0 - hi) / (1.0 - hi - lo)


def wang_weights(num_atoms: int, eta: float) -> Tensor:
    """The weights [M], float64, of `wang`."""
    _check_finite("eta", eta)
    return torch.special.ndtr(torch.special.ndtri(_grid(num_atoms)) + eta).diff()


def tv_weights(num_atoms: int, rho: float) -> Tensor:
    """The weights [M], float64, of `tv_worst_case`."""
    _check_share("rho", rho)
    return _mass_between(num_atoms, 0.0, 1.0 - rho) + rho * _lowest_atom(num_atoms)


def _grid(num_atoms: int) -> Tensor:
    """The cumulative masses 0, 1/M, ..., 1 between which the atoms lie."""
    return torch.arange(num_atoms + 1, dtype=torch.float64) / num_atoms


def _mass_between(num_atoms: int, low: float, high: float) -> Tensor:
    """How much of each atom's mass lies between two cumulative masses: this is where an atom is split."""
    return _grid(num_atoms).clamp(low, high).diff()


def _lowest_atom(num_atoms: int) -> Tensor:
    return torch.eye(1, num_atoms, dtype=torch.float64)[0]


# The rank advantage


def rank_advantage(targets: Tensor, atoms: Tensor, width: float = 0.0, floor: float = 0.0) -> Tensor:
    """How often the target law beats the predicted one: a bounded advantage, indifferent to scale and
    outliers.

        width = 0:  A = P(G > Z) + P(G = Z)/2 - 1/2   (Mann-Whitney)
        width = h:  A = mean_k mean_j clamp( (G_k - theta_j) / (2h), -1/2, 1/2 )

    h -> 0 is the rank, h -> infinity the mean advantage up to its scale 2h. For a binary reward, lam = 1 and
    an exact law it is (r - V)/2. O((L + M) log M) time and O(L + M) memory: no M x L tensor.

    A floor contracts the lower tail and keeps the upper one: G_k is max(G_k, q), q the atom of Z at mass `floor`, so
    that all that lies below is as bad as q and no worse. Its mean under an exact law is floor^2/2 and not 0.

    Args:
        targets: [..., L], atoms G_k of the target law at this state, computed with the actor's lam; any
            order.
        atoms: [..., M], atoms theta_j of the value law at this state; any order.
        width: h >= 0, in units of the reward.
        floor: mass in [0, 1) of the lower tail; 0 = none.

    Returns:
        [...], in [-1/2, 1/2], without gradient; NaN where an atom is NaN.

    Raises:
        ValueError: the leading shapes differ, the width is negative, or the floor is out of range.

    Source: Mann and Whitney 1947; ours as an advantage.
    """
    if targets.dim() < 1 or targets.shape[:-1] != atoms.shape[:-1]:
        shapes = f"{tuple(targets.shape)} and {tuple(atoms.shape)}"
        raise ValueError(f"targets must be [..., L] and atoms [..., M] with the same ..., got {shapes}")
    if not width >= 0.0:
        raise ValueError(f"width must be >= 0, got {width}")
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"floor must lie in [0, 1), got {floor}")
    parts = row_parts(*(at_least_float32(law).detach() for law in (targets, atoms)))
    ranks = [_rank_advantage(targets_KL, atoms_KM, width, floor) for targets_KL, atoms_KM in parts]
    return torch.cat(ranks).view(targets.shape[:-1])


def _rank_advantage(targets: Tensor, atoms: Tensor, width: float, floor: float) -> Tensor:
    targets, atoms = (ascending(law.contiguous()) for law in (targets, atoms))
    if floor > 0:
        lowest = math.floor(floor * atoms.shape[-1])
        targets = targets.maximum(atoms[..., lowest : lowest + 1])  # stays ascending
    advantages = _smooth_rank(targets, atoms, width) if width > 0 else _rank(targets, atoms)
    # NaN comes last in a sorted row, and a comparison would take it for a number.
    return torch.where(targets[..., -1].isnan() | atoms[..., -1].isnan(), torch.nan, advantages)


def _rank(targets: Tensor, atoms: Tensor) -> Tensor:
    if backend(targets) == "compiled" and targets.dtype == atoms.dtype:
        return compiled_ranks.rank_advantage(targets, atoms)
    below = torch.searchsorted(atoms, targets, out_int32=True)
    not_above = torch.searchsorted(atoms, targets, right=True, out_int32=True)
    wins = (below + not_above).to(targets.dtype) / 2.0
    return wins.mean(dim=-1) / atoms.shape[-1] - 0.5


def _smooth_rank(targets: Tensor, atoms: Tensor, width: float) -> Tensor:
    """Atoms below G - h count +1/2, above G + h -1/2, and those between add up to (n G - sum theta) / (2h).

    In float64: the sum is a difference of prefix sums, which one distant atom would strip of its digits in
    float32.
    """
    num_atoms = atoms.shape[-1]
    wide_targets, wide_atoms = targets.double(), atoms.double()
    first = torch.searchsorted(wide_atoms, wide_targets - width)
    last = torch.searchsorted(wide_atoms, wide_targets + width)
    prefix = torch.nn.functional.pad(wide_atoms.cumsum(dim=-1), (1, 0))
    between = (last - first) * wide_targets - (prefix.gather(-1, last) - prefix.gather(-1, first))
    score = (first - (num_atoms - last)) / 2.0 + between / (2.0 * width)
    return (score.mean(dim=-1) / num_atoms).to(targets.dtype)


# Denoising with known rates


def noise_corrected_value(value: Tensor, p: float, q: float) -> Tensor:
    """The true success probability behind an observed one, clip( (V - p) / (1 - p - q), 0, 1 ).

    Args:
        value: any shape, the probability that the *observed* binary reward is 1.
        p: false-positive rate, >= 0.
        q: false-negative rate, >= 0; p + q < 1.

    Returns:
        The shape of `value`, in [0, 1].

    Raises:
        ValueError: the rates are out of range.

    Source: Natarajan et al. 2013; "backward correction" of arXiv 2510.00915.
    """
    _check_rates("p", p, "q", q)
    return ((at_least_float32(value) - p) / (1.0 - p - q)).clamp(0.0, 1.0)


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")


def _check_rates(first: str, first_rate: float, second: str, second_rate: float) -> None:
    if not (first_rate >= 0.0 and second_rate >= 0.0 and first_rate + second_rate < 1.0):
        rates = f"{first_rate} and {second_rate}"
        raise ValueError(f"{first} and {second} must be >= 0 with a sum below 1, got {rates}")
