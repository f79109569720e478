"""The critic's loss on a CPU, compiled by Numba: the eight terms of a token in one pass, their gradient in another.

The mathematics is that of `core/sorted_huber.py` and `core/terms.py`; here a token's predictions are merged with its
sorted atoms instead of searched for, and all that is done for a token happens while it is in the cache. Inputs are
float32 or float64, sums are float64. Tokens know nothing of each other: threads share them out, and no bit changes.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import uintp
from torch import Tensor

from dvpo.core.compiling import array, compiled, rows_ascend, share_out

QUERIES, ATOMS, ONE = uintp(16), uintp(8), uintp(1)
"""Sizes of the blocks that meet in `count_below`: two vector registers of queries in float32."""
NEAR = 2.0**10
"""Predictions within so many kappa of one of them are compared in float32, others in float64, a third slower."""


class TailSizes(NamedTuple):
    """How many whole atoms each tail has."""

    low: int
    up: int
    target_low: int
    target_up: int
    bends_low: int
    bends_up: int
    """Of the second differences; 0 if there are none."""


class Kept(NamedTuple):
    """What the gradient needs besides the predictions."""

    slopes_KNM: Tensor
    """Of each level's loss, mean over heads."""
    tails_KS: Tensor
    """Columns: see `_forward`."""
    ranks_KM: Tensor
    """The indices that sort the ensemble; empty if it is sorted."""


def terms_forward(
    theta_KNM: Tensor, atoms_KL: Tensor, levels_M: Tensor, weights_M: Tensor, kappa: float, sizes: TailSizes
) -> tuple[Tensor, Kept]:
    """The eight terms, [8, K], and what `terms_backward` needs.

    Args:
        theta_KNM: predictions, float32 or float64, in any order along M.
        atoms_KL: targets of the same dtype, in any order.
        levels_M: tau.
        weights_M: of the levels in the risk term, float64, mean 1.
        kappa: half-width of the quadratic zone, >= 0 and finite.
        sizes: of the tails.
    """
    theta, atoms = array(theta_KNM), _sorted(array(atoms_KL))
    order = _order(theta)
    ranks = _order(theta.mean(axis=1, dtype=np.float64)) if order.size else order
    terms, slopes = np.empty((8, len(theta)), theta.dtype), np.empty_like(theta)
    tails = np.empty((len(theta), 8))
    taus, weights = array(levels_M.double()), array(weights_M)
    share_out(_forward, len(theta), theta, atoms, order, ranks, taus, weights, kappa, *sizes, terms, slopes, tails)
    return torch.from_numpy(terms), Kept(*map(torch.from_numpy, (slopes, tails, ranks)))


def terms_backward(
    grads: list[Tensor | None], theta_KNM: Tensor, kept: Kept, weights_M: Tensor, sizes: TailSizes
) -> Tensor:
    """The gradient in theta, [K, N, M], of the terms weighed with what came back for each, [K] or None."""
    if grads[0] is not None and all(grad is None for grad in grads[1:]):  # the slopes of quantile regression are there
        scale_K: Tensor = grads[0] / theta_KNM.shape[-1]
        return kept.slopes_KNM * scale_K[:, None, None]
    theta = array(theta_KNM)
    grads_8K = np.zeros((8, len(theta)))
    for row, grad_K in zip(grads_8K, grads, strict=True):
        if grad_K is not None:
            row[:] = array(grad_K)
    result = np.empty_like(theta)
    weights, of_theta = array(weights_M), (sizes.low, sizes.up, sizes.bends_low, sizes.bends_up)
    share_out(_backward, len(theta), grads_8K, theta, *map(array, kept), weights, *of_theta, result)
    return torch.from_numpy(result)


def huber_sums(theta_KNM: Tensor, atoms_KL: Tensor, levels_M: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """As `dvpo.core.sorted_huber.huber_sums`, with atoms in any order."""
    theta, atoms = array(theta_KNM), _sorted(array(atoms_KL))
    losses, slopes = np.empty_like(theta[:, 0]), np.empty_like(theta)
    share_out(_huber, len(theta), theta, atoms, _order(theta), array(levels_M.double()), kappa, losses, slopes)
    return torch.from_numpy(losses), torch.from_numpy(slopes)


def _sorted(atoms: Any) -> Any:
    return atoms if rows_ascend(atoms) else np.sort(atoms, axis=-1)


def _order(values: Any) -> Any:
    """The indices that sort each row, [rows, M]; [0, 0] if all rows are sorted, as those of monotone heads are."""
    rows = values.reshape(-1, values.shape[-1])
    return np.empty((0, 0), np.int64) if rows_ascend(rows) else np.argsort(rows, axis=-1)


@compiled
def _prefix_sums(atoms: Any, sums: Any, squares: Any) -> float:
    """Of the atoms' distances from their mean, which is returned, and of the squares."""
    mean = 0.0
    for atom in atoms:
        mean += atom
    mean /= len(atoms)
    sums[0] = squares[0] = 0.0
    for k in range(len(atoms)):
        away = atoms[k] - mean
        sums[k + 1] = sums[k] + away
        squares[k + 1] = squares[k] + away * away
    return mean


@compiled
def count_below(queries: Any, atoms: Any, shift: Any, below: Any) -> None:
    """below[j]: how many atoms lie below query j + shift.

    Both are sorted and end in infinities: to whole blocks, and one block of atoms at the least. A block of queries
    meets blocks of atoms, each number each, in vector instructions, until one ends above the last query; there the next
    queries begin. As many meetings as there are blocks, and one branch in each that the values decide.
    """
    # Unsigned, since a negative index would be asked whether it counts from the end.
    k = uintp(0)
    for j in range(uintp(0), uintp(len(queries)), QUERIES):
        last, passed = queries[j + QUERIES - ONE] + shift, np.int32(k)
        for q in range(j, j + QUERIES):
            below[q] = passed  # atoms of earlier blocks lie below all these
        while True:
            for q in range(j, j + QUERIES):
                count, query = np.int32(0), queries[q] + shift
                for a in range(ATOMS):
                    count += np.int32(atoms[k + a] < query)
                below[q] += count
            if not atoms[k + ATOMS - ONE] < last:
                break
            k += ATOMS


@compiled
def _merge_ties(queries: Any, atoms: Any, below: Any) -> None:
    """below[0, j], below[1, j]: how many atoms lie below query j, and how many not above it."""
    i0, i1, last = uintp(0), uintp(0), uintp(len(atoms) - 1)
    under, not_over = below[0], below[1]
    for k in range(uintp(len(queries) + len(atoms) - 2)):
        j0, j1 = k - i0, k - i1
        under[j0], not_over[j1] = i0, i1
        i0 += uintp(atoms[i0] < queries[j0])
        i1 += uintp((atoms[i1] <= queries[j1]) & (i1 < last))


@compiled
def _scratch(theta: Any, num_atoms: int) -> Any:
    """Queries and atoms with infinities behind, both again in float64, prefix sums, counts, by rank values, slopes and
    levels."""
    num_quantiles, whole = theta.shape[2], int(QUERIES)
    queries = np.full((num_quantiles // whole + 1) * whole, np.inf, theta.dtype)
    atoms = np.full((num_atoms // int(ATOMS) + 1) * int(ATOMS), np.inf, theta.dtype)
    exact, wide = np.full(len(queries), np.inf), np.full(len(atoms), np.inf)
    sums, squares = np.empty(num_atoms + 1), np.empty(num_atoms + 1)
    below = np.empty((3, len(queries)), np.int32)
    return queries, atoms, exact, wide, sums, squares, below, np.empty((3, num_quantiles))


@compiled
def _huber_token(
    theta: Any, given: Any, order: Any, first: int, taus: Any, kappa: float, scratch: Any, losses: Any, slopes: Any
) -> float:
    """Losses by level, summed over heads (overwritten), and slopes of their mean; returns the mean of the atoms."""
    queries, atoms, exact, wide, sums, squares, below, rows = scratch
    num_heads, num_quantiles = theta.shape
    num_atoms = len(given)
    mean = _prefix_sums(given, sums, squares)
    sound = math.isfinite(squares[num_atoms])
    # Counts compare numbers of theta's type, from which a prediction is taken: at an offset they keep what tells them
    # apart. (From the mean of the atoms one outlier would round all others away.) An atom that rounding puts on the
    # wrong side of a kink lies so near that neither sum shows it; only kappa = 0 has a jump there, and compares what
    # was given.
    origin = theta[0, num_quantiles // 2] if kappa > 0 else theta.dtype.type(0)
    for k in range(num_atoms):
        atoms[k], wide[k] = given[k] - origin, given[k] - mean
    losses[:] = 0.0
    values, by_rank, tau = rows
    for i in range(num_heads):
        bad = 0
        if order.size:
            for j in range(num_quantiles):
                exact[j], tau[j] = theta[i, order[first + i, j]], taus[order[first + i, j]]
        else:
            for j in range(num_quantiles):
                exact[j] = theta[i, j]
        for j in range(num_quantiles):
            bad += not math.isfinite(exact[j])
            queries[j] = exact[j] - origin
            exact[j] -= mean
        if bad or not sound:
            losses[:], slopes[i] = np.nan, np.nan
            continue
        if order.size:
            values[:] = 0.0
            _add_head(queries, atoms, exact, wide, sums, squares, below, kappa, tau, num_heads, values, by_rank)
            for j in range(num_quantiles):
                losses[order[first + i, j]] += values[j]
                slopes[i, order[first + i, j]] = by_rank[j]
        else:
            _add_head(queries, atoms, exact, wide, sums, squares, below, kappa, taus, num_heads, losses, slopes[i])
    return mean


@compiled
def _add_head(
    queries: Any, atoms: Any, exact: Any, wide: Any, sums: Any, squares: Any, below: Any, kappa: float, tau: Any,
    num_heads: int, losses: Any, slopes: Any,
) -> None:  # fmt: skip
    """Add a head's losses, write its slopes: of predictions that ascend, from which the atoms' mean is taken."""
    num_quantiles, num_atoms = len(tau), len(sums) - 1
    if kappa > 0:
        near = max(queries[num_quantiles - 1], -queries[0]) <= NEAR * kappa  # NaN is not
        for e in range(3):
            if near:
                count_below(queries, atoms, queries.dtype.type((e - 1) * kappa), below[e])
            else:
                count_below(exact, wide, (e - 1) * kappa, below[e])
        _smooth(exact, sums, squares, below, kappa, tau, num_heads, losses, slopes)
    else:
        _merge_ties(queries[: num_quantiles + 1], atoms[: num_atoms + 1], below)
        _pinball(exact, sums, below, tau, num_heads, losses, slopes)


@compiled
def _smooth(
    queries: Any, sums: Any, squares: Any, below: Any, kappa: float, tau: Any, num_heads: int, losses: Any, slopes: Any
) -> None:
    """Differences of P' and 2 P of `core/sorted_huber.py` between query - kappa, query and query + kappa.

    below[e, j]: how many atoms lie below each of these.
    """
    num_atoms = len(sums) - 1
    per_atom, per_head = 1.0 / (kappa * num_atoms), 1.0 / num_heads
    for j in range(len(tau)):
        at0, at1, at2 = queries[j] - kappa, queries[j], queries[j] + kappa
        n0, n1, n2 = below[0, j], below[1, j], below[2, j]
        sum0, sum1, sum2 = sums[uintp(n0)], sums[uintp(n1)], sums[uintp(n2)]
        f0, f1, f2 = n0 * at0 - sum0, n1 * at1 - sum1, n2 * at2 - sum2
        s0 = at0 * (f0 - sum0) + squares[uintp(n0)]
        s1 = at1 * (f1 - sum1) + squares[uintp(n1)]
        s2 = at2 * (f2 - sum2) + squares[uintp(n2)]
        value = (1 - tau[j]) * (s1 - s0) + tau[j] * (s2 - s1)
        slope = (1 - tau[j]) * (f1 - f0) + tau[j] * (f2 - f1)
        losses[j] += value * (0.5 * per_atom) - tau[j] * (at1 + 0.5 * kappa)
        slopes[j] = (slope * per_atom - tau[j]) * per_head


@compiled
def _pinball(queries: Any, sums: Any, below: Any, tau: Any, num_heads: int, losses: Any, slopes: Any) -> None:
    """kappa = 0; an atom that ties with a prediction counts in neither slope."""
    num_atoms = len(sums) - 1
    for j in range(len(tau)):
        at, under, not_over = queries[j], below[0, j], below[1, j]
        losses[j] += (under * at - sums[under]) / num_atoms - tau[j] * at
        slopes[j] = ((1 - tau[j]) * under + tau[j] * (not_over - num_atoms)) / (num_atoms * num_heads)


@compiled
def _huber(
    start: int, stop: int, theta: Any, atoms: Any, order: Any, taus: Any, kappa: float, losses: Any, slopes: Any
) -> None:
    num_heads, num_quantiles = theta.shape[1:]
    scratch, by_level = _scratch(theta, atoms.shape[1]), np.empty(num_quantiles)
    for k in range(start, stop):
        _huber_token(theta[k], atoms[k], order, k * num_heads, taus, kappa, scratch, by_level, slopes[k])
        for j in range(num_quantiles):
            losses[k, j] = by_level[j] / num_heads


@compiled
def _ensemble(theta: Any, centre: float, ranks: Any, k: int, by_level: Any, by_rank: Any) -> None:
    """The mean over heads less `centre`, level by level and sorted.

    No term depends on where 0 lies, but a difference of squares does.
    """
    num_heads, num_quantiles = theta.shape
    by_level[:] = 0.0
    for i in range(num_heads):
        for j in range(num_quantiles):
            by_level[j] += theta[i, j]
    for j in range(num_quantiles):
        by_level[j] = by_level[j] / num_heads - centre
    for r in range(num_quantiles):
        by_rank[r] = by_level[ranks[k, r]] if ranks.size else by_level[r]


@compiled
def _moments(atoms: Any, centre: float) -> tuple[float, float]:
    """Mean, less `centre`, and population variance."""
    mean = 0.0
    for atom in atoms:
        mean += atom - centre
    mean /= len(atoms)
    variance = 0.0
    for atom in atoms:
        variance += (atom - centre - mean) ** 2
    return mean, variance / len(atoms)


@compiled
def _bends_down(ranked: Any, start: int, stop: int) -> float:
    """Mean of relu(-D) over second differences."""
    total = 0.0
    for d in range(start, stop):
        total += max(0.0, 2 * ranked[d + 1] - ranked[d + 2] - ranked[d])
    return total / (stop - start)


@compiled
def _forward(
    start: int, stop: int, theta: Any, atoms: Any, order: Any, ranks: Any, taus: Any, weights: Any, kappa: float,
    low: int, up: int, target_low: int, target_up: int, bends_low: int, bends_up: int,
    terms: Any, slopes: Any, tails: Any,
) -> None:  # fmt: skip
    num_heads, num_quantiles = theta.shape[1:]
    num_atoms, num_bends = atoms.shape[1], num_quantiles - 2
    scratch, losses = _scratch(theta, num_atoms), np.empty(num_quantiles)
    by_level, ranked = np.empty(num_quantiles), np.empty(num_quantiles)
    for k in range(start, stop):
        centre = _huber_token(theta[k], atoms[k], order, k * num_heads, taus, kappa, scratch, losses, slopes[k])
        qr = risk = 0.0
        for j in range(num_quantiles):
            qr += losses[j]
            risk += losses[j] * weights[j]
        _ensemble(theta[k], centre, ranks, k, by_level, ranked)
        spread = mean = 0.0
        for j in range(num_quantiles):
            mean += by_level[j]
        for i in range(num_heads):
            for j in range(num_quantiles):
                spread += (theta[k, i, j] - centre - by_level[j]) ** 2
        low_mean, low_variance = _moments(ranked[:low], 0.0)
        up_mean, up_variance = _moments(ranked[num_quantiles - up :], 0.0)
        target_low_mean, target_low_variance = _moments(atoms[k, :target_low], centre)
        target_up_mean, target_up_variance = _moments(atoms[k, num_atoms - target_up :], centre)
        cvar_gap, gain_gap, shift = low_mean - target_low_mean, up_mean - target_up_mean, -mean / num_quantiles
        too_wide, too_narrow = low_variance - target_low_variance, target_up_variance - up_variance
        terms[0, k], terms[1, k] = qr / (num_heads * num_quantiles), risk / (num_heads * num_quantiles)
        terms[2, k], terms[3, k], terms[4, k] = cvar_gap**2, gain_gap**2, max(shift, 0.0)
        terms[5, k] = max(too_wide, 0.0) + max(too_narrow, 0.0)
        terms[6, k] = 0.0
        if num_bends > 0:
            terms[6, k] = _bends_down(ranked, 0, bends_low) + _bends_down(ranked, num_bends - bends_up, num_bends)
        # The mean squared difference of two heads is twice their unbiased variance: no loop over pairs.
        terms[7, k] = 2 * spread / (max(1, num_heads - 1) * num_quantiles)
        if not math.isfinite(qr):
            terms[:, k] = np.nan
        kept = tails[k]
        kept[0], kept[1], kept[2], kept[3], kept[4] = centre, cvar_gap, gain_gap, low_mean, up_mean
        kept[5], kept[6], kept[7] = shift > 0, too_wide > 0, too_narrow > 0


@compiled
def _backward(
    start: int, stop: int, grads: Any, theta: Any, slopes: Any, tails: Any, ranks: Any, weights: Any,
    low: int, up: int, bends_low: int, bends_up: int, result: Any,
) -> None:  # fmt: skip
    num_heads, num_quantiles = theta.shape[1:]
    by_level, ranked, push = np.empty(num_quantiles), np.empty(num_quantiles), np.empty(num_quantiles)
    pushed, by_head = np.empty(num_quantiles), np.empty(num_quantiles)
    num_bends = num_quantiles - 2
    for k in range(start, stop):
        qr, risk, cvar, gain, shift, shape, curvature, consistency = grads[:, k]
        centre, cvar_gap, gain_gap, low_mean, up_mean, shifts, contracts, widens = tails[k]
        _ensemble(theta[k], centre, ranks, k, by_level, ranked)
        push[:] = -shift * shifts / num_quantiles
        contract, widen = 2 * shape * contracts / low, -2 * shape * widens / up
        for r in range(low):
            push[r] += 2 * cvar * cvar_gap / low + contract * (ranked[r] - low_mean)
        for r in range(num_quantiles - up, num_quantiles):
            push[r] += 2 * gain * gain_gap / up + widen * (ranked[r] - up_mean)
        for first, last in ((0, bends_low), (num_bends - bends_up, num_bends)):
            for d in range(first, last):
                if ranked[d] + ranked[d + 2] < 2 * ranked[d + 1]:
                    step = curvature / (last - first)
                    push[d] -= step
                    push[d + 1] += 2 * step
                    push[d + 2] -= step
        for r in range(num_quantiles):
            pushed[ranks[k, r] if ranks.size else r] = push[r] / num_heads
        for j in range(num_quantiles):
            by_head[j] = (qr + risk * weights[j]) / num_quantiles
        apart = 4 * consistency / (max(1, num_heads - 1) * num_quantiles)
        for i in range(num_heads):
            for j in range(num_quantiles):
                away = theta[k, i, j] - centre - by_level[j]
                result[k, i, j] = slopes[k, i, j] * by_head[j] + pushed[j] + apart * away
