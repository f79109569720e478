"""Sums, means and whitening over policy tokens: what stands at a masked position never reaches a result.

`mask` is 1 (or True) where the policy produced the token and 0 elsewhere: padding, and in multi-turn text
every token of the user or of a tool. Masked positions may hold anything, NaN and infinity included, because
they are *replaced* by zero rather than multiplied by it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a small tensor over all processes; how is the caller's business: `core` knows no process group."""

STD_EPS = 1e-8


def identity(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Lift bf16, half and integers to float32, and leave float32 and float64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Put 0 where the mask is 0, whatever stood there.

    Use it on the *inputs* of a per-token loss when masked positions may hold NaN or infinity: zeroing the
    loss itself would clean its value but not its gradient, where 0 times NaN is NaN.

    Args:
        values: [*mask.shape, ...]; trailing dimensions beyond the mask's are allowed.
        mask: 0/1 or bool.

    Returns:
        A tensor of the shape and dtype of `values`.

    Raises:
        ValueError: the leading dimensions differ.
    """
    if values.shape[: mask.dim()] != mask.shape:
        shapes = f"{tuple(values.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"the shape of the values must begin with that of the mask, got {shapes}")
    keep = mask.bool().reshape(mask.shape + (1,) * (values.dim() - mask.dim()))
    return torch.where(keep, values, torch.zeros((), dtype=values.dtype, device=values.device))


def rows_where(values: Tensor, mask: Tensor) -> Tensor:
    """What stands where the mask is 1: values[mask], and the same gradient.

    Whole rows are copied, and their gradients added to zeros: on a CPU half the time of indexing by a mask, both ways.

    Args:
        values: [*mask.shape, ...].
        mask: bool.

    Returns:
        [K, ...], K = mask.sum().
    """
    return values.flatten(0, mask.dim() - 1).index_select(0, mask.flatten().nonzero().squeeze(-1))


def token_count(mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Count the policy tokens of all processes, at least 1 so that it can stand below a fraction.

    Args:
        mask: any shape, 0/1 or bool.
        reduce: sums over processes.

    Returns:
        An int64 scalar tensor.
    """
    return reduce(mask.bool().sum()).clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Sum over policy tokens, sum_t mask_t x_t.

    Args:
        values: any shape, equal to the mask's.
        mask: 0/1 or bool.
        reduce: sums over processes.

    Returns:
        A scalar tensor, float32 or float64.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(values, mask)
    return reduce(zero_masked(at_least_float32(values), mask).sum())


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Mean over the policy tokens of all processes, sum_t mask_t x_t / max(sum_t mask_t, 1).

    Args:
        values: any shape, equal to the mask's.
        mask: 0/1 or bool.
        reduce: sums over processes.

    Returns:
        A scalar tensor, 0 for an empty mask.

    Raises:
        ValueError: the shapes differ.
    """
    return masked_sum(values, mask, reduce) / token_count(mask, reduce)


def masked_variance(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Population variance over the policy tokens of all processes, sum_t mask_t (x_t - mean)^2 / max(count,
    1).

    Args:
        values: any shape, equal to the mask's.
        mask: 0/1 or bool.
        reduce: sums over processes.

    Returns:
        A scalar tensor, 0 for an empty mask.

    Raises:
        ValueError: the shapes differ.
    """
    _, variance = _centre(values, mask, reduce)
    return variance


def whiten(advantages: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Give the policy tokens of the *global* batch mean 0 and deviation 1: (A - mean) / (population std +
    1e-8).

    Args:
        advantages: [B,T] (or any shape), this process's share.
        mask: the same shape, 0/1 or bool.
        reduce: sums over processes, so that every process divides by the same number.

    Returns:
        Whitened advantages of the same shape, 0 at masked positions.

    Raises:
        ValueError: the shapes differ.
    """
    centred, variance = _centre(advantages, mask, reduce)
    return centred / (variance.sqrt() + STD_EPS)


def _centre(values: Tensor, mask: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """(values less their mean, 0 where masked; population variance), by the corrected two-pass algorithm."""
    values, count = at_least_float32(values), token_count(mask, reduce)
    rough = zero_masked(values - masked_sum(values, mask, reduce) / count, mask)
    # Far from 0 the first mean is rounded to few digits; the mean of what it left is exact.
    missed, mean_square = reduce(torch.stack([rough.sum(), rough.square().sum()])) / count
    return zero_masked(rough - missed, mask), (mean_square - missed.square()).clamp(min=0)


def _same_shape(values: Tensor, mask: Tensor) -> None:
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have one shape")
