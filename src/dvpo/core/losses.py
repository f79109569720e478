"""Per-token losses of actor and scalar critic, KL estimators, and the weights that add tokens up.

A loss leaves this file as one number a token. `aggregation_weights` says what each token counts and what the
whole is divided by, over the *global* batch of an optimiser step, so that

    loss = sum over processes and micro-batches of sum_bt weights_bt loss_bt  /  denominator

does not depend on how the batch was cut. The per-token losses take any shape: the flat policy tokens [K], or
[B,T]. Where masked positions of [B,T] may hold NaN, pass the *inputs* through `masks.zero_masked` (it says
why).
"""

from typing import Literal

import torch
from torch import Tensor

from dvpo.core.masks import Reduce, at_least_float32, identity, token_count

LOG_RATIO_BOUND = 20.0
"""exp(20) = 4.9e8: far outside every clip range, still far from float32's infinity and its NaN gradients."""

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_sum_fixed_length"]
KLEstimator = Literal["k1", "k2", "k3"]


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    ratio = exp(logp - logp_old), the exponent clamped to [-20, 20]; beyond it the gradient is 0.

    Args:
        logprobs: any shape, log-probabilities under the policy being trained (the gradient flows here only).
        old_logprobs: the same shape, recorded at sampling.
        advantages: the same shape.
        clip_low: how far the ratio may fall below 1, in [0, 1].
        clip_high: how far it may rise above 1, >= 0.

    Returns:
        (loss, clipped) of the same shape: the loss of each token, and a bool that is true where the clip
        holds the token back, i.e. where its gradient is 0.

    Raises:
        ValueError: the shapes differ, or a clip range is out of bounds.

    Source: Schulman et al. 2017 (PPO); unequal ranges as in DAPO, Yu et al. 2025.
    """
    _one_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be >= 0, got {clip_low} and {clip_high}")
    advantages = at_least_float32(advantages).detach()
    ratio = _log_ratio(logprobs, old_logprobs.detach()).exp()
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    too_high = (ratio > 1.0 + clip_high) & (advantages > 0)
    too_low = (ratio < 1.0 - clip_low) & (advantages < 0)
    return loss, too_high | too_low


def truncated_ratio(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """How often a token counts whose sampler was not quite the policy: min(p / p_sampler, cap).

    In the mean over what the sampler drew, weights p / p_sampler give the policy's own expectation; the cap bounds
    their variance and leaves a bias where it binds.

    Args:
        logprobs: any shape, the trainer's log-probabilities under the weights that sampled.
        sampler_logprobs: the same shape, the sampler's for the same weights.
        cap: greatest weight, > 0.

    Returns:
        (weights, capped) of the same shape, without gradient: the weights, and 1 where the cap binds, else 0.

    Raises:
        ValueError: the shapes differ, or the cap is not positive.

    Source: truncated importance sampling, Ionides 2008; between sampling engine and trainer: Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training".
    """
    _one_shape(logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    if cap <= 0:
        raise ValueError(f"cap must be positive, got {cap}")
    ratio = _log_ratio(logprobs.detach(), sampler_logprobs.detach()).exp()
    return ratio.clamp(max=cap), (ratio > cap).to(ratio.dtype)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> Tensor:
    """Half the squared error of a scalar critic, with PPO's value clipping.

        1/2 max( (v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2 )

    Args:
        values: any shape, the predictions (the gradient flows here only), in units of the reward.
        old_values: the same shape, the predictions before the step's first update.
        returns: the regression targets, broadcast to that shape (one target for several heads: [..., 1]).
        value_clip: c > 0 in units of the reward, or None for the plain squared error.

    Returns:
        The loss of each value, of the shape of `values`.

    Raises:
        ValueError: the shapes do not fit, or the clip is not positive.

    Source: Schulman et al. 2017 and the PPO code published with it.
    """
    _one_shape(values=values, old_values=old_values)
    returns = _broadcast(returns, values)
    values, old_values = at_least_float32(values), at_least_float32(old_values).detach()
    error = (values - returns).square()
    if value_clip is None:
        return 0.5 * error
    if value_clip <= 0:
        raise ValueError(f"value_clip must be positive, or None for no clipping, got {value_clip}")
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum(error, (clipped - returns).square())


def huber_value_loss(values: Tensor, returns: Tensor, kappa: float) -> Tensor:
    """The Huber function of a scalar critic's error.

        H(u) = u^2 / (2 kappa) if |u| <= kappa else |u| - kappa / 2,   u = v - R;   kappa = 0: |u|

    Args:
        values: any shape, the predictions (the gradient flows here only), in units of the reward.
        returns: the regression targets, broadcast to that shape (one target for several heads: [..., 1]).
        kappa: >= 0, half the width of the quadratic zone, in units of the reward.

    Returns:
        The loss of each value, of the shape of `values`.

    Raises:
        ValueError: the shapes do not fit, or kappa is negative.

    Source: Huber 1964.
    """
    if not kappa >= 0:
        raise ValueError(f"kappa must be at least 0, got {kappa}")
    error = (at_least_float32(values) - _broadcast(returns, values)).abs()
    if kappa == 0:
        return error
    return torch.where(error <= kappa, error.square() / (2.0 * kappa), error - kappa / 2.0)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) from the log-probabilities of the sampled token.

        d = logp - logp_ref:   k1 = d,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d

    k1 and k3 have the right mean, k2 and k3 are never negative. d is clamped to [-20, 20].

    Args:
        logprobs: any shape, under the policy (the gradient flows here only).
        reference_logprobs: the same shape, under the reference model.
        kind: `k1`, `k2` or `k3`.

    Returns:
        The estimate of each token, of the same shape.

    Raises:
        ValueError: the shapes differ, or the kind is unknown.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    _one_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    difference = _log_ratio(logprobs, reference_logprobs.detach())
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return torch.expm1(-difference) + difference
    raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")


def aggregation_weights(
    mask: Tensor, kind: Aggregation, fixed_length: int | None = None, reduce: Reduce = identity
) -> tuple[Tensor, Tensor]:
    """What each token counts in the loss, and what the weighted sum is divided by.

        token_mean             weight 1,                       denominator: policy tokens
        seq_mean_token_mean    weight 1 / (the row's tokens),  denominator: sequences
        seq_sum_fixed_length   weight 1,                       denominator: fixed_length * sequences

    Call it once for all sequences of an optimiser step and cut the weights into micro-batches afterwards: a
    denominator taken per micro-batch would let short micro-batches weigh too much. A sequence without a
    policy token (it was masked out) is not counted.

    Args:
        mask: [B,T], 0/1 or bool: this process's share of the optimiser step.
        kind: one of the three above.
        fixed_length: the configured response length in tokens; `seq_sum_fixed_length` only.
        reduce: sums over processes.

    Returns:
        (weights [B,T] in float32, 0 at masked positions; the global denominator, a scalar tensor >= 1).

    Raises:
        ValueError: the mask is not [B,T], the kind is unknown, or the fixed length is not positive.

    Source: `seq_sum_fixed_length` is Dr. GRPO's, Liu et al. 2025; the others are PPO's and GRPO's.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B,T], got {tuple(mask.shape)}")
    weights_BT = mask.bool().float()
    tokens_B1 = weights_BT.sum(dim=1, keepdim=True)
    match kind:
        case "token_mean":
            return weights_BT, token_count(mask, reduce)
        case "seq_mean_token_mean":
            return weights_BT / tokens_B1.clamp(min=1), token_count(tokens_B1, reduce)
        case "seq_sum_fixed_length":
            if fixed_length is None or fixed_length <= 0:
                raise ValueError(f"seq_sum_fixed_length needs a positive fixed_length, got {fixed_length}")
            return weights_BT, fixed_length * token_count(tokens_B1, reduce)
    raise ValueError(f"kind must be token_mean, seq_mean_token_mean or seq_sum_fixed_length, got {kind!r}")


def _log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    difference = at_least_float32(logprobs) - at_least_float32(other_logprobs)
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _broadcast(returns: Tensor, values: Tensor) -> Tensor:
    """The targets, detached, in the shape of the predictions; never the other way round (a silent [B,B])."""
    try:
        return at_least_float32(returns).detach().expand_as(values)
    except RuntimeError:
        shapes = f"{tuple(returns.shape)} and {tuple(values.shape)}"
        raise ValueError(f"returns must broadcast to the shape of the values, got {shapes}") from None


def _one_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"all must have one shape, got {shapes}")
