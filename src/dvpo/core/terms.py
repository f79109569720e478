"""The eight terms of the critic's loss and their gradient in one pass: what `dvpo.core.risk.critic_terms` defines.

On a CPU `core/compiled_loss.py` does all of it, and this file says with which arguments. Elsewhere both quantile terms
come from one evaluation of the sorted form, both tails from one sort of the ensemble. A term of the ensemble is a
function of its sorted quantiles; its slope is made with its value, as pieces [K, n] that act on the ranks from `start`
on, so that tails cost what tails are long.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dvpo.core import backends, compiled_loss

TERMS = ("qr", "risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")


def fused_terms(
    predictions: Tensor, targets: Tensor, levels: Tensor, kappa: float, eta: float, alpha: float, beta: float
) -> dict[str, Tensor]:
    """The terms of `critic_terms`, whose arguments and results these are; checked and at least float32."""
    leading = predictions.shape[:-2]
    terms_of = _CompiledTerms if backends.backend(predictions) == "compiled" else _CriticTerms
    terms_K = terms_of.apply(
        predictions.reshape(-1, *predictions.shape[-2:]),
        targets.to(predictions.dtype).reshape(-1, targets.shape[-1]),
        levels,
        kappa,
        eta,
        alpha,
        beta,
    )
    return {name: term_K.view(leading) for name, term_K in zip(TERMS, terms_K, strict=True)}


@dataclass(frozen=True)
class Piece:
    """The slope of a term for the sorted quantiles of rank `start`, `start` + 1, ..."""

    start: int
    slope_Kn: Tensor


class _CriticTerms(torch.autograd.Function):
    """theta [K, N, M], G [K, L] -> eight terms [K]. What backward needs beside `slopes_KNM` is small."""

    @staticmethod
    def forward(
        ctx: Any,
        theta_KNM: Tensor,
        atoms_KL: Tensor,
        levels_M: Tensor,
        kappa: float,
        eta: float,
        alpha: float,
        beta: float,
    ) -> tuple[Tensor, ...]:
        atoms_KL = atoms_KL.sort(dim=-1).values
        losses_KM, slopes_KNM = backends.huber_sums(theta_KNM, atoms_KL, levels_M, kappa)
        weights_M = _risk_weights(levels_M, eta).to(losses_KM)

        # No term depends on where 0 lies, but far from it float32 has few digits for a difference of means. It is put
        # on a prediction: the atoms' mean follows an outlier, far from all the others.
        centre_K1 = theta_KNM[:, 0, theta_KNM.shape[-1] // 2, None]
        spread_KNM = theta_KNM - centre_K1[:, None]
        ensemble_KM = spread_KNM.mean(dim=1)
        order_KM = ensemble_KM.argsort(dim=-1)
        terms, ctx.pieces = _ensemble_terms(ensemble_KM.gather(-1, order_KM), atoms_KL - centre_K1, alpha, beta)

        # The mean squared difference of two heads is twice their unbiased variance: no loop over pairs.
        num_heads = theta_KNM.shape[1]
        spread_KNM -= ensemble_KM[:, None]
        consistency_K = spread_KNM.square().sum(dim=1).mean(dim=-1) * (2 / max(1, num_heads - 1))
        ctx.save_for_backward(slopes_KNM, spread_KNM, weights_M, order_KM)
        ctx.set_materialize_grads(False)  # a term that is not in the loss has the gradient None
        return losses_KM.mean(dim=-1), (losses_KM @ weights_M).div_(len(levels_M)), *terms, consistency_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes_KNM, spread_KNM, weights_M, order_KM = ctx.saved_tensors
        num_heads, num_quantiles = slopes_KNM.shape[1:]
        qr_K, risk_K, *ensemble_grads, consistency_K = grads
        # What every head's prediction at a level is multiplied by, or receives alike.
        by_level_KM = torch.zeros_like(slopes_KNM[:, 0])
        if qr_K is not None:
            by_level_KM += qr_K[:, None] / num_quantiles
        if risk_K is not None:
            by_level_KM += risk_K[:, None] * (weights_M / num_quantiles)
        ranked_KM = torch.zeros_like(by_level_KM)
        for grad_K, pieces in zip(ensemble_grads, ctx.pieces, strict=True):
            if grad_K is not None:
                for piece in pieces:
                    size = piece.slope_Kn.shape[-1]
                    ranked_KM.narrow(-1, piece.start, size).addcmul_(grad_K[:, None], piece.slope_Kn)
        shared_KM = torch.empty_like(ranked_KM).scatter_(-1, order_KM, ranked_KM.div_(num_heads))
        grad_KNM = torch.addcmul(shared_KM[:, None], slopes_KNM, by_level_KM[:, None])
        if consistency_K is not None and num_heads > 1:
            scale_K = consistency_K * (4 / ((num_heads - 1) * num_quantiles))
            grad_KNM.addcmul_(scale_K[:, None, None], spread_KNM)
        return grad_KNM, *(None,) * 6


class _CompiledTerms(torch.autograd.Function):
    """The same on a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        theta_KNM: Tensor,
        atoms_KL: Tensor,
        levels_M: Tensor,
        kappa: float,
        eta: float,
        alpha: float,
        beta: float,
    ) -> tuple[Tensor, ...]:
        num_quantiles, num_atoms = theta_KNM.shape[-1], atoms_KL.shape[-1]
        of = (num_quantiles, num_atoms, num_quantiles - 2)
        sizes = [tail_size(share, size) if size > 0 else 0 for size in of for share in (alpha, beta)]
        ctx.sizes = compiled_loss.TailSizes(*sizes)
        weights_M = _risk_weights(levels_M, eta)
        terms_8K, kept = compiled_loss.terms_forward(theta_KNM, atoms_KL, levels_M, weights_M, kappa, ctx.sizes)
        ctx.save_for_backward(theta_KNM, weights_M, *kept)
        ctx.set_materialize_grads(False)
        return terms_8K.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        theta_KNM, weights_M, *kept = ctx.saved_tensors
        grad_KNM = compiled_loss.terms_backward(list(grads), theta_KNM, compiled_loss.Kept(*kept), weights_M, ctx.sizes)
        return grad_KNM, *(None,) * 6


def _risk_weights(levels_M: Tensor, eta: float) -> Tensor:
    """exp(-eta tau_j) / mean_j exp(-eta tau_j), float64."""
    return torch.softmax(-eta * levels_M.double(), dim=-1) * len(levels_M)


def _ensemble_terms(
    theta_KM: Tensor, atoms_KL: Tensor, alpha: float, beta: float
) -> tuple[list[Tensor], list[list[Piece]]]:
    """cvar, gain, shift, shape and curvature of sorted quantiles, and the slopes of each."""
    low_Kn, up_Kn = _tails(theta_KM, alpha, beta)
    low, up = _Tail(low_Kn, 0), _Tail(up_Kn, theta_KM.shape[-1] - up_Kn.shape[-1])
    target_low, target_up = (_Tail(tail, 0) for tail in _tails(atoms_KL, alpha, beta))
    cvar_gap_K1, gain_gap_K1 = low.mean_K1 - target_low.mean_K1, up.mean_K1 - target_up.mean_K1
    shift_K1 = atoms_KL.mean(dim=-1, keepdim=True) - theta_KM.mean(dim=-1, keepdim=True)
    contract_K1 = (low.variance_K1 - target_low.variance_K1).relu()
    widen_K1 = (target_up.variance_K1 - up.variance_K1).relu()
    curvature_K, bends = _curvature(theta_KM, alpha, beta)
    terms_K1 = (cvar_gap_K1.square(), gain_gap_K1.square(), shift_K1.relu(), contract_K1 + widen_K1)
    return [*(term_K1.squeeze(-1) for term_K1 in terms_K1), curvature_K], [
        [low.mean_slope(2 * cvar_gap_K1)],
        [up.mean_slope(2 * gain_gap_K1)],
        [Piece(0, ((shift_K1 > 0).to(theta_KM) / -theta_KM.shape[-1]).expand_as(theta_KM))],
        [low.variance_slope((contract_K1 > 0).to(theta_KM)), up.variance_slope(-(widen_K1 > 0).to(theta_KM))],
        bends,
    ]


class _Tail:
    """Mean and population variance of a tail of sorted atoms (0 for one atom, not NaN), and their slopes."""

    def __init__(self, atoms_Kn: Tensor, start: int) -> None:
        self.start, self.size = start, atoms_Kn.shape[-1]
        self.mean_K1 = atoms_Kn.mean(dim=-1, keepdim=True)
        self.deviation_Kn = atoms_Kn - self.mean_K1
        self.variance_K1 = self.deviation_Kn.square().mean(dim=-1, keepdim=True)

    def mean_slope(self, factor_K1: Tensor) -> Piece:
        return Piece(self.start, (factor_K1 / self.size).expand_as(self.deviation_Kn))

    def variance_slope(self, factor_K1: Tensor) -> Piece:
        return Piece(self.start, self.deviation_Kn * (factor_K1 * (2 / self.size)))


def tail_size(share: float, size: int) -> int:
    """How many whole atoms the tail of a law of `size` atoms has: ceil(share * size), at least one."""
    return max(1, math.ceil(share * size - 1e-9))


def _tails(atoms: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The first ceil(alpha n) and the last ceil(beta n) of n sorted atoms, at least one of each."""
    size = atoms.shape[-1]
    num_low, num_up = (tail_size(share, size) for share in (alpha, beta))
    return atoms[..., :num_low], atoms[..., size - num_up :]


def _curvature(theta_KM: Tensor, alpha: float, beta: float) -> tuple[Tensor, list[Piece]]:
    """Second differences that bend down, mean over both tails of them."""
    if theta_KM.shape[-1] < 3:
        return torch.zeros_like(theta_KM[:, 0]), []
    bends_KD = theta_KM.diff(n=2, dim=-1)
    low_Kn, up_Kn = _tails(bends_KD, alpha, beta)
    value_K = torch.zeros_like(theta_KM[:, 0])
    pieces = []
    for tail_Kn, start in ((low_Kn, 0), (up_Kn, bends_KD.shape[-1] - up_Kn.shape[-1])):
        value_K = value_K - tail_Kn.clamp(max=0).mean(dim=-1)
        push_Kn = (tail_Kn < 0).to(theta_KM) / tail_Kn.shape[-1]  # D = theta_+ - 2 theta + theta_-, and the term is -D
        pieces += [Piece(start, -push_Kn), Piece(start + 1, 2 * push_Kn), Piece(start + 2, -push_Kn)]
    return value_K, pieces
