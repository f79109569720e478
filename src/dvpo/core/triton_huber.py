"""The sums of `core/sorted_huber.py` on a GPU: a Triton program a token, with its atoms and prefix sums in registers.

Written for GPUs and tested in Triton's interpreter; `benchmarks/gpu.py` measures it where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def huber_sums(theta_KNM: Tensor, atoms_KL: Tensor, levels_M: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """As `dvpo.core.sorted_huber.huber_sums`: float32, atoms sorted; sums are float64."""
    num_tokens, num_heads, num_quantiles = theta_KNM.shape
    theta_KNM, atoms_KL = theta_KNM.contiguous(), atoms_KL.contiguous()
    losses_KM, slopes_KNM = torch.empty_like(theta_KNM[:, 0]), torch.empty_like(theta_KNM)
    if num_tokens:
        num_atoms = atoms_KL.shape[-1]
        with torch.cuda.device_of(theta_KNM):  # Triton launches on the current GPU, wherever its arguments are
            _huber_token[(num_tokens,)](
                theta_KNM, atoms_KL, levels_M.to(theta_KNM).contiguous(), losses_KM, slopes_KNM,
                kappa, num_quantiles, num_atoms, num_heads,
                triton.next_power_of_2(num_quantiles), num_atoms.bit_length(), kappa > 0,
            )  # fmt: skip
    return losses_KM, slopes_KNM


@triton.jit
def _count_below(atoms, queries, depth: tl.constexpr, with_ties: tl.constexpr):
    """How many of 2^depth sorted atoms, the last an infinity, are below each query; or not above it, `with_ties`.

    The steps of a binary search, for all queries together.
    """
    count = tl.zeros_like(queries).to(tl.int32)
    for halving in tl.static_range(1, depth + 1):
        step = (1 << depth) >> halving
        probe = tl.gather(atoms, count + (step - 1), 0)
        if with_ties:
            count += tl.where(probe <= queries, step, 0)
        else:
            count += tl.where(probe < queries, step, 0)
    return count


@triton.jit
def _first(prefix, count):
    """The sum of the first `count` entries, from inclusive prefix sums."""
    return tl.where(count > 0, tl.gather(prefix, tl.maximum(count - 1, 0), 0), 0.0)


@triton.jit
def _huber_token(
    theta_ptr, atoms_ptr, levels_ptr, losses_ptr, slopes_ptr,
    kappa, num_quantiles, num_atoms,
    num_heads: tl.constexpr, block_m: tl.constexpr, depth: tl.constexpr, smooth: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    j, k = tl.arange(0, block_m), tl.arange(0, 1 << depth)
    level, atom = j < num_quantiles, k < num_atoms
    tau = tl.load(levels_ptr + j, mask=level, other=0.5).to(tl.float64)
    atoms = tl.load(atoms_ptr + token * num_atoms + k, mask=atom, other=float("inf"))
    wide = tl.where(atom, atoms, 0.0).to(tl.float64)
    mean = tl.sum(wide, axis=0) / num_atoms
    away = tl.where(atom, wide - mean, 0.0)
    sums, squares = tl.cumsum(away, axis=0), tl.cumsum(away * away, axis=0)
    # Counts compare float32, less a prediction from here on: an offset takes no digits then. Ties need what was given.
    origin = 0.0
    if smooth:
        origin = tl.load(theta_ptr + token * num_heads * num_quantiles + num_quantiles // 2)
    atoms -= origin
    loss = tl.zeros([block_m], dtype=tl.float64)
    for i in tl.static_range(num_heads):
        at = (token * num_heads + i) * num_quantiles + j
        theta = tl.load(theta_ptr + at, mask=level, other=0.0)
        x = theta.to(tl.float64) - mean
        theta -= origin
        n1 = _count_below(atoms, theta, depth, False)
        s1 = _first(sums, n1)
        if smooth:
            n0 = _count_below(atoms, theta - kappa, depth, False)
            n2 = _count_below(atoms, theta + kappa, depth, False)
            s0, s2 = _first(sums, n0), _first(sums, n2)
            f0, f1, f2 = n0 * (x - kappa) - s0, n1 * x - s1, n2 * (x + kappa) - s2  # P'
            q0 = (x - kappa) * (f0 - s0) + _first(squares, n0)  # 2 P
            q1 = x * (f1 - s1) + _first(squares, n1)
            q2 = (x + kappa) * (f2 - s2) + _first(squares, n2)
            scale = 1.0 / (kappa * num_atoms)
            loss += ((1 - tau) * (q1 - q0) + tau * (q2 - q1)) * (0.5 * scale) - tau * (x + 0.5 * kappa)
            slope = ((1 - tau) * (f1 - f0) + tau * (f2 - f1)) * scale - tau
        else:
            not_over = tl.minimum(_count_below(atoms, theta, depth, True), num_atoms)
            loss += (n1 * x - s1) / num_atoms - tau * x
            slope = ((1 - tau) * n1 + tau * (not_over - num_atoms)) / num_atoms
        tl.store(slopes_ptr + at, (slope / num_heads).to(tl.float32), mask=level)
    tl.store(losses_ptr + token * num_quantiles + j, (loss / num_heads).to(tl.float32), mask=level)
