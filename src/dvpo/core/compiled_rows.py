"""Compiled for a CPU: targets from the last token to the first, and quantiles that cannot cross."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvpo.core.compiling import array, compiled, share_out


def lambda_targets(
    rewards_BT: Tensor,
    quantiles_BTM: Tensor,
    keep_BT: Tensor,
    gamma: float,
    lam: float,
    ends_BM: Tensor,
    silent_B: Tensor,
    delta_clip: float | None,
    advantages_BTM: Tensor | None,
    out_BTM: Tensor,
) -> None:
    """Write the targets of `dvpo.core.returns.distributional_gae`, and its advantages where they are wanted.

    `out_BTM` may be `quantiles_BTM`. `silent_B`: whose last policy token has no reward.
    """
    advantages = np.empty((0, 0, 0), out_BTM.numpy().dtype) if advantages_BTM is None else advantages_BTM.numpy()
    factors = np.array((gamma, lam, math.inf if delta_clip is None else delta_clip), out_BTM.numpy().dtype)
    given = map(array, (rewards_BT, quantiles_BTM, keep_BT, ends_BM, silent_B))
    share_out(_lambda_targets, len(keep_BT), *given, factors, advantages, out_BTM.numpy(), least=1)


def monotone_forward(raw: Tensor) -> Tensor:
    """As `dvpo.core.monotone.monotone_quantiles`."""
    rows = array(raw).reshape(-1, raw.shape[-1])
    result = torch.empty(*raw.shape[:-1], raw.shape[-1] - 1, dtype=raw.dtype)  # by torch: numpy's memory lies anywhere
    share_out(_monotone, len(rows), rows, result.view(len(rows), -1).numpy())
    return result


def monotone_backward(raw: Tensor, grad: Tensor) -> Tensor:
    """The gradient in its argument."""
    rows, grads = (array(x).reshape(-1, x.shape[-1]) for x in (raw, grad))
    result = torch.empty(raw.shape, dtype=raw.dtype)
    share_out(_monotone_gradient, len(rows), rows, grads, result.view(rows.shape).numpy())
    return result


@compiled
def _lambda_targets(
    start: int, stop: int, rewards: Any, quantiles: Any, keep: Any, ends: Any, silent: Any,
    factors: Any, advantages: Any, targets: Any,
) -> None:  # fmt: skip
    """From the last token of each sequence to the first; what a masked position holds is never read.

    Rows are copied in and out, since a loop whose arrays may overlap gets no vector instructions.
    """
    gamma, lam, clip = factors
    by_value, by_target, clips = gamma * (1 - lam), gamma * lam, not np.isinf(clip)
    size = quantiles.shape[2]
    now, after = np.empty(size, ends.dtype), np.empty(size, ends.dtype)
    carried, target = np.empty(size, ends.dtype), np.empty(size, ends.dtype)
    for b in range(start, stop):
        for j in range(size):
            after[j] = target[j] = ends[b, j]
            carried[j] = 0.0  # the advantage, where deltas are clipped
        unrewarded = silent[b]
        for t in range(quantiles.shape[1] - 1, -1, -1):
            if not keep[b, t]:
                targets[b, t, :] = 0.0
                if advantages.size:
                    advantages[b, t, :] = 0.0
                continue
            reward = rewards[b, t]
            for j in range(size):
                now[j] = quantiles[b, t, j]
            if unrewarded:  # adds nothing: its state takes the place of the end
                unrewarded = False
                for j in range(size):
                    target[j] = now[j]
            elif clips:
                for j in range(size):
                    carried[j] = min(max(reward + gamma * after[j] - now[j], -clip), clip) + by_target * carried[j]
                for j in range(size):
                    target[j] = now[j] + carried[j]
            else:
                # Only convex combinations: targets that are equal, as all are at lam = 1, come out equal.
                for j in range(size):
                    target[j] = reward + by_value * after[j] + by_target * target[j]
            for j in range(size):
                targets[b, t, j] = target[j]
            if advantages.size:
                for j in range(size):
                    advantages[b, t, j] = target[j] - now[j]
            for j in range(size):
                after[j] = now[j]


f32 = np.float32  # a plain number would make these sums float64


@compiled
def _exp_minus(x: Any) -> Any:
    """exp(-x) for x >= 0, exp(-87) from there on: 2^-n times a polynomial, which gets vector instructions.

    Taylor's to the seventh power, an error of 5e-9 for what is left, within log(2) / 2.
    """
    x = min(x, f32(87.0))
    n = np.int32(x * f32(1 / math.log(2)) + f32(0.5))
    m = f32(n)  # an int32 times a float32 would be a float64
    r = (m * f32(0.693359375) - x) + m * f32(-2.12194440e-4)  # log(2) in two parts, the first product exact
    p = f32(1 / 5040)
    p = p * r + f32(1 / 720)
    p = p * r + f32(1 / 120)
    p = p * r + f32(1 / 24)
    p = p * r + f32(1 / 6)
    p = p * r + f32(1 / 2)
    p = (p * r + f32(1)) * r + f32(1)
    return p * np.int32((np.int32(127) - n) << np.int32(23)).view(np.float32)


@compiled
def _softplus(x: Any) -> Any:
    """log(1 + exp(x)) to 1e-7 of its size.

    log(1 + e) = 2 (s + s^3 / 3 + ... + s^13 / 13) with s = e / (2 + e) <= 1/3.
    """
    e = _exp_minus(abs(x))
    s = e / (f32(2) + e)
    q = s * s
    p = f32(1 / 13)
    p = p * q + f32(1 / 11)
    p = p * q + f32(1 / 9)
    p = p * q + f32(1 / 7)
    p = p * q + f32(1 / 5)
    p = p * q + f32(1 / 3)
    return max(x, f32(0)) + f32(2) * s * (p * q + f32(1))


@compiled
def _running_sums(rows: Any, less: Any) -> None:
    """Turn four rows into running sums, each number less its row's `less`: one sum need not wait for another."""
    sum0 = sum1 = sum2 = sum3 = 0.0
    row0, row1, row2, row3 = rows
    for j in range(len(row0)):
        sum0 += row0[j] - less[0]
        sum1 += row1[j] - less[1]
        sum2 += row2[j] - less[2]
        sum3 += row3[j] - less[3]
        row0[j], row1[j], row2[j], row3[j] = sum0, sum1, sum2, sum3


@compiled
def _monotone(start: int, stop: int, raw: Any, quantiles: Any) -> None:
    size = quantiles.shape[1]
    heights, zeros = np.empty((4, size), np.float32), np.zeros(4)
    for first in range(start, stop, 4):
        for r in range(4):
            row = raw[min(first + r, stop - 1)]
            for j in range(size):
                heights[r, j] = _softplus(row[j + 1])
        _running_sums(heights, zeros)
        for r in range(min(4, stop - first)):
            total = 0.0
            for j in range(size):
                total += heights[r, j]
            base = raw[first + r, 0] - f32(total / (size * size))
            for j in range(size):
                quantiles[first + r, j] = base + heights[r, j] * f32(1 / size)


@compiled
def _monotone_gradient(start: int, stop: int, raw: Any, grads: Any, result: Any) -> None:
    """To x_k goes sigmoid(x_k) / M times the sum over j >= k of grad_j - mean grad, or less that over j < k."""
    size = grads.shape[1]
    earlier, means = np.empty((4, size), np.float32), np.empty(4)
    for first in range(start, stop, 4):
        for r in range(4):
            i = min(first + r, stop - 1)
            total = 0.0
            for j in range(size):
                total += grads[i, j]
                earlier[r, j] = grads[i, j]
            result[i, 0], means[r] = total, total / size
        _running_sums(earlier, means)
        for r in range(min(4, stop - first)):
            row, out = raw[first + r], result[first + r]
            out[1] = 0.0
            for j in range(1, size):
                x = row[j + 1]
                e = _exp_minus(abs(x))
                sigmoid = (f32(1) if x >= 0 else e) / (f32(1) + e)
                out[j + 1] = -earlier[r, j - 1] * sigmoid * f32(1 / size)
