"""The figures that a run logs; every one is a statement about the *global* batch. Glossary: docs/metrics.md."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dvpo.batch import Rollout
from dvpo.core.backends import ascending
from dvpo.core.masks import Reduce
from dvpo.core.quantiles import crossing_share

CALIBRATION_BINS = 10
SAME = 1e-6
"""Rewards that differ by less are the same."""
MANY_CUT = 0.2
"""A share of responses cut by the length limit above which a run's line and its report say so."""


class Means:
    """Means collected over micro-batches and processes: name -> sum(values) / number of values."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor | float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, values: Tensor) -> None:
        entry = self._sums[name]
        entry[0] += values.detach().double().sum()
        entry[1] += values.numel()

    def result(self, reduce: Reduce, agreed: Callable[[Iterable[str]], list[str]] = list) -> dict[str, float]:
        """The means over all processes.

        Args:
            reduce: sums over processes.
            agreed: makes one list of every process's names, where a process may have had nothing to add to some.
        """
        names = agreed(self._sums)
        if not names:
            return {}
        # On the CPU: a process that has nothing to add does not know where the others' tensors are.
        pairs = [[torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in self._sums[n]] for n in names]
        totals = reduce(torch.stack([torch.stack(pair) for pair in pairs])).tolist()
        return {name: s / w if w else math.nan for name, (s, w) in zip(names, totals, strict=True)}


def mean_of(values: Tensor, reduce: Reduce) -> float:
    """The mean over all processes; NaN of nothing."""
    means = Means()
    means.add("", values)
    return means.result(reduce)[""]


def correlation(x_K: Tensor, y_K: Tensor, reduce: Reduce) -> float:
    """Pearson correlation over all processes; NaN when either is constant or there is nothing."""
    moments = _moments(x_K, y_K, reduce)
    if moments is None:
        return math.nan
    _, var_x, var_y, covariance = moments
    # A spread below float32's rounding of the values is no spread.
    return covariance / math.sqrt(var_x * var_y) if min(var_x, var_y) > 1e-12 else math.nan


def explained_variance(values_K: Tensor, returns_K: Tensor, reduce: Reduce) -> float:
    """1 - Var(return - V) / Var(return) over all processes; 0 for a constant V, NaN for constant returns."""
    moments = _moments(values_K, returns_K, reduce)
    if moments is None:
        return math.nan
    _, var_v, var_r, covariance = moments
    return 1 - (var_r + var_v - 2 * covariance) / var_r if var_r > 1e-12 else math.nan


def calibration_error(values_K: Tensor, returns_K: Tensor, reduce: Reduce) -> float:
    """Mean over tokens of |mean return - mean V| in ten equal-width bins of V; the outer two are open.

    The bins reach two standard deviations of V to either side of its mean: a blind critic keeps its V within a small
    part of the returns' range, and one outlier among the returns would put all of V into one bin.
    """
    moments = _moments(values_K, values_K, reduce)
    if moments is None:
        return math.nan
    mean, variance, *_ = moments
    width = max(4 * math.sqrt(variance) / CALIBRATION_BINS, 1e-12)
    bins_K = ((values_K.double() - mean) / width).floor().long() + CALIBRATION_BINS // 2
    gap_K = returns_K.double() - values_K.double()
    gaps = gap_K.new_zeros(CALIBRATION_BINS).index_add(0, bins_K.clamp(0, CALIBRATION_BINS - 1), gap_K)
    total, count = reduce(gaps).abs().sum(), reduce(torch.ones_like(gap_K).sum())
    return float(total / count)


def _moments(x_K: Tensor, y_K: Tensor, reduce: Reduce) -> tuple[float, float, float, float] | None:
    """Mean of x, variances and covariance, in float64 and in two passes; None for fewer than two pairs."""
    x, y = x_K.double(), y_K.double()
    count, sum_x, sum_y = reduce(torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum()])).tolist()
    if count < 2:
        return None
    mean_x, mean_y = sum_x / count, sum_y / count
    dx, dy = x - mean_x, y - mean_y
    var_x, var_y, covariance = (
        reduce(torch.stack([dx.square().sum(), dy.square().sum(), (dx * dy).sum()])) / count
    ).tolist()
    return mean_x, var_x, var_y, covariance


def critic_figures(values: Tensor, returns: Tensor, truth: Tensor, seen: Tensor, reduce: Reduce) -> dict[str, float]:
    """What the critic knew before the update, against what then happened.

    Args:
        values: [..., N, M], predictions at the states of tokens.
        returns: [...], observed return from each token on (Monte Carlo, whatever lambda trains the critic).
        truth: [...], true outcome of the token's response, NaN where unknown.
        seen: bool [...], tokens whose reward was observed: those that count.
        reduce: sums over processes.
    """
    # Figures of all tokens, then of those that count: the other way round copies all the predictions.
    heads_KN = values.mean(dim=-1)[seen]
    values_K, returns_K, truth_K = heads_KN.mean(dim=-1), returns[seen], truth[seen]
    known_K = truth_K.isfinite()
    error = Means()
    error.add("critic/value_mean", values_K)
    error.add("critic/return_mean", returns_K)
    error.add("critic/squared_error", (values_K - returns_K).square())
    error.add("critic/squared_return", returns_K.square())
    if values.shape[-1] > 1:
        ends = [round(q * (values.shape[-1] - 1)) for q in (0.1, 0.9)]
        crossings = crossing_share(values)[seen]
        # Where no head crosses itself, their mean ascends: two of its numbers are enough.
        theta = ascending(values.mean(dim=-2))[..., ends] if crossings.any() else values[..., ends].mean(dim=-2)
        error.add("critic/spread", (theta[..., 1] - theta[..., 0])[seen])
        error.add("critic/crossing_share", crossings.flatten())
    if values.shape[-2] > 1:
        error.add("critic/head_disagreement", (heads_KN - values_K.unsqueeze(-1)).square().mean(dim=-1).sqrt())
    figures = error.result(reduce)
    figures["critic/value_error"] = math.sqrt(figures.pop("critic/squared_error"))
    figures["critic/return_size"] = math.sqrt(figures.pop("critic/squared_return"))
    return figures | {
        "critic/explained_variance": explained_variance(values_K, returns_K, reduce),
        "critic/calibration_error": calibration_error(values_K, returns_K, reduce),
        "critic/true_correlation": correlation(values_K[known_K], truth_K[known_K], reduce),
    }


def reward_figures(
    observed_B: Tensor, true_B: Tensor, rewarded_B: Tensor, groups_B: Tensor, reduce: Reduce
) -> dict[str, float]:
    """Observed and true reward of the responses, and how often they agree where both are known.

    Args:
        observed_B: observed return, NaN where missing.
        true_B: true return, NaN where unknown.
        rewarded_B: False where the observed return is missing.
        groups_B: equal for the responses to one prompt, which one process holds together.
        reduce: sums over processes.
    """
    means = Means()
    seen_B, known_B = observed_B[rewarded_B], true_B.isfinite()
    both_B = known_B & rewarded_B
    means.add("reward/observed", seen_B)
    means.add("reward/true", true_B[known_B])
    means.add("reward/accuracy", (observed_B[both_B] - true_B[both_B]).abs() < SAME)
    means.add("reward/pairwise_accuracy", _ordered_pairs(observed_B[both_B], true_B[both_B], groups_B[both_B]))
    means.add("reward/missing", (~rewarded_B).double())
    return means.result(reduce)


def signal_figures(observed_B: Tensor, true_B: Tensor, groups_B: Tensor, reduce: Reduce) -> dict[str, float]:
    """Share of the prompts whose responses nothing tells apart; NaN where no prompt has two of them.

    Noise breaks ties: by the observed returns fewer prompts are without signal than by the truth.

    Args:
        observed_B: observed return, NaN where missing.
        true_B: true return, NaN where unknown; a prompt of which fewer than two are known does not count.
        groups_B: equal for the responses to one prompt, which one process holds together.
        reduce: sums over processes.
    """
    means, known_B = Means(), true_B.isfinite()
    means.add("reward/no_signal", _silent_groups(observed_B, groups_B))
    means.add("reward/no_signal_true", _silent_groups(true_B[known_B], groups_B[known_B]))
    return means.result(reduce)


def has_signal(returns_B: Tensor) -> bool:
    """Whether the returns of a group, NaN where missing, tell one response from another."""
    seen_B = returns_B[returns_B.isfinite()]
    return len(seen_B) > 1 and float(seen_B.max() - seen_B.min()) >= SAME


def task_figures(tasks: Iterable[str], task_B: Sequence[str], true_B: Tensor, reduce: Reduce) -> dict[str, float]:
    """Mean true reward of each task of a mix; NaN where a step has no response of it.

    Args:
        tasks: their names.
        task_B: whose each response is.
        true_B: true return, NaN where unknown.
        reduce: sums over processes.
    """
    means = Means()
    for name in tasks:
        own_B = torch.tensor([owner == name for owner in task_B], device=true_B.device)
        means.add(f"reward/true/{name}", true_B[own_B & true_B.isfinite()])
    return means.result(reduce)


def rollout_figures(rollout: Rollout, sampled: int, reduce: Reduce) -> dict[str, float]:
    """How much a step trains on; `sampled` responses were drawn for it, those that were replaced included."""
    tokens, responses, drawn, truncated = reduce(
        torch.tensor(
            [float(rollout.mask_BT.sum()), len(rollout), sampled, float(rollout.truncated_B.sum())],
            dtype=torch.float64,
        )
    ).tolist()
    return {
        "rollout/sampled": drawn,
        "rollout/tokens": tokens,
        "rollout/length": tokens / responses,
        "rollout/truncated": truncated / responses,
    }


def reward_reach(mask_BT: Tensor, decay: float, reduce: Reduce) -> float:
    """How much of its response's last reward a token's advantage holds, mean over tokens; the rest is the critic's.

    A = sum_n decay^n delta_n, and only the last delta holds that reward: decay^n for a token with n tokens behind it.

    Args:
        mask_BT: tokens that count.
        decay: gamma lambda of the advantages.
        reduce: sums over processes.
    """
    behind_BT = mask_BT.flip(1).cumsum(1).flip(1) - 1
    return mean_of((decay ** behind_BT.double())[mask_BT], reduce)


def _silent_groups(returns_B: Tensor, groups_B: Tensor) -> Tensor:
    """Of each group of two or more, whether it is without signal."""
    returns_B, groups_B = returns_B.cpu(), groups_B.cpu()  # asked of a GPU group by group they would wait for it
    groups = [returns_B[groups_B == group] for group in groups_B.unique()]
    return torch.tensor([not has_signal(own_B) for own_B in groups if len(own_B) > 1])


def _ordered_pairs(observed_B: Tensor, true_B: Tensor, groups_B: Tensor) -> Tensor:
    """For each pair of responses to one prompt, the first truly better: 1 if observed so, 1/2 for a tie, else 0."""
    better_BB = (true_B.unsqueeze(1) - true_B > SAME) & (groups_B.unsqueeze(1) == groups_B)
    gaps = (observed_B.unsqueeze(1) - observed_B)[better_BB]
    return torch.where(gaps.abs() < SAME, 0.5, (gaps > 0).float())
