"""Advantages and critic targets: GAE, its distributional form, mixture targets, and baselines from groups.

A state's value is read *before* its token, so `values[:, t]` belongs to the state in which token t is chosen.
The state that follows a policy token is the state of the *next policy token*: recursions skip masked
positions (padding, user and tool turns), carry their running values over them, and discount policy tokens
only. After the last policy token the value is 0 (terminated) or the bootstrap (truncated).
"""

import math

import torch
from torch import Tensor

from dvpo.core import backends, compiled_rows
from dvpo.core.masks import at_least_float32, zero_masked
from dvpo.core.scan import PolicyRows, discounted_scan_, take_rows

GROUP_STD_EPS = 1e-4

# Quantiles worked on at a time by torch, in whole sequences: each chunk costs some hundred launches.
_CHUNK = 2**26


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    *,
    zero_last_delta: Tensor | None = None,
    delta_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over policy tokens.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   A_t = delta_t + gamma lam A_{t+1},   R_t = V(s_t) + A_t

    Args:
        rewards: [B,T], 0 at masked positions.
        values: [B,T], V(s_t) in units of the reward; anything at masked positions.
        mask: [B,T], 1 on policy tokens.
        gamma: discount per policy token, in [0, 1].
        lam: weight of the longer returns, in [0, 1].
        bootstrap: [B], the value after the last token; 0 for a sequence that terminated. None is 0
            everywhere.
        zero_last_delta: [B] bool, sequences whose final reward is missing: the delta of their last policy
            token is 0, so that the critic's opinion of it stands. That token's reward is not read and may be
            NaN.
        delta_clip: c > 0 clamps every delta to [-c, c], in units of the reward; None leaves them as they are.

    Returns:
        (advantages, returns), [B,T] without gradient, 0 at masked positions.

    Raises:
        ValueError: shapes do not fit, gamma or lam is out of range, or a reward stands at a masked position.

    Source: Schulman et al. 2016.
    """
    if values.dim() != 2:
        raise ValueError(f"values must be [B,T], got {tuple(values.shape)}")
    bootstrap_B1 = None if bootstrap is None else bootstrap.unsqueeze(-1)
    advantages_BT1, returns_BT1 = distributional_gae(
        rewards,
        values.unsqueeze(-1),
        mask,
        gamma,
        lam,
        bootstrap_B1,
        zero_last_delta=zero_last_delta,
        delta_clip=delta_clip,
    )
    return advantages_BT1.squeeze(-1), returns_BT1.squeeze(-1)


@torch.no_grad()
def distributional_gae(
    rewards: Tensor,
    quantiles: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    *,
    zero_last_delta: Tensor | None = None,
    delta_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """GAE for every quantile index by itself.

        delta_tj = r_t + gamma theta_j(s_{t+1}) - theta_j(s_t),   A_tj = delta_tj + gamma lam A_{t+1,j}
        G_tj     = theta_j(s_t) + A_tj = r_t + gamma [ (1 - lam) theta_j(s_{t+1}) + lam G_{t+1,j} ]

    The mean over j is scalar GAE on V = mean_j theta_j. With quantiles (and bootstrap) sorted along j the
    targets are sorted too; for lam strictly between 0 and 1 they keep the mean of the true target law but not
    its spread, which `mixture_targets` does.

    Args:
        rewards: [B,T], 0 at masked positions.
        quantiles: [B,T,M], theta_j(s_t) in units of the reward; anything at masked positions.
        mask: [B,T], 1 on policy tokens.
        gamma: discount per policy token, in [0, 1].
        lam: weight of the longer returns, in [0, 1].
        bootstrap: [B,M], quantiles after the last token; 0 for a sequence that terminated. None is 0
            everywhere.
        zero_last_delta: [B] bool, as in `gae`.
        delta_clip: as in `gae`, for every index by itself.

    Returns:
        (advantages, targets), [B,T,M] without gradient, 0 at masked positions.

    Raises:
        ValueError: shapes do not fit, gamma or lam is out of range, or a reward stands at a masked position.

    Source: DVPO, arXiv 2512.03847.
    """
    dtype = at_least_float32(quantiles.new_empty(0)).dtype
    advantages_BTM = torch.empty_like(quantiles, dtype=dtype, memory_format=torch.contiguous_format)
    targets_BTM = _lambda_targets(
        rewards, quantiles, mask, gamma, lam, bootstrap, zero_last_delta, delta_clip, advantages_BTM
    )
    return advantages_BTM, targets_BTM


@torch.no_grad()
def distributional_targets(
    rewards: Tensor,
    quantiles: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    *,
    zero_last_delta: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The targets of `distributional_gae`, without its advantages.

    Args:
        rewards, quantiles, mask, gamma, lam, bootstrap, zero_last_delta: as there.
        out: [B,T,M], contiguous, float32 or float64 as computed; may be `quantiles` itself, which are then overwritten.
            Fresh memory costs several times what the computation does.

    Returns:
        targets, [B,T,M] without gradient, 0 at masked positions; `out` if given.

    Raises:
        ValueError: as there, or `out` does not fit.
    """
    if out is not None and not (out.is_contiguous() and out.shape == quantiles.shape):
        raise ValueError(f"out must be contiguous {tuple(quantiles.shape)}, got {tuple(out.shape)}")
    return _lambda_targets(rewards, quantiles, mask, gamma, lam, bootstrap, zero_last_delta, out=out)


def _lambda_targets(
    rewards: Tensor,
    quantiles: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    zero_last_delta: Tensor | None,
    delta_clip: float | None = None,
    advantages_BTM: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the targets, and write the advantages where they are wanted; off a CPU, a few sequences at a time.

    A last token without a reward adds nothing: its state takes the place of the end, and is its own target.
    """
    quantiles_BTM, keep_BT = at_least_float32(quantiles), mask.bool()
    _check(rewards, quantiles_BTM, keep_BT, gamma, lam, bootstrap, zero_last_delta)
    targets_BTM = torch.empty_like(quantiles_BTM, memory_format=torch.contiguous_format) if out is None else out
    if targets_BTM.numel() == 0:
        return targets_BTM
    ends_BM = torch.zeros_like(quantiles_BTM[:, 0]) if bootstrap is None else bootstrap.to(quantiles_BTM)
    if backends.backend(quantiles_BTM) == "compiled":
        silent_B = torch.zeros_like(keep_BT[:, 0]) if zero_last_delta is None else zero_last_delta.bool()
        given = (rewards.to(quantiles_BTM), quantiles_BTM, keep_BT, gamma, lam, ends_BM, silent_B, delta_clip)
        compiled_rows.lambda_targets(*given, advantages_BTM, targets_BTM)
        return targets_BTM
    rows = PolicyRows.of(keep_BT, zero_last_delta)
    rewards_BS1 = rewards.to(quantiles_BTM).gather(1, rows.source_BR[:, :-1]).unsqueeze(-1)
    sequences = max(1, _CHUNK // quantiles_BTM[0].numel())
    num_rows, num_quantiles = rows.source_BR.shape[1], quantiles_BTM.shape[-1]
    # Reused by all chunks; the last row of `packed` is the 0 of masked positions.
    states = quantiles_BTM.new_empty(min(sequences, len(keep_BT)), num_rows, num_quantiles)
    packed = quantiles_BTM.new_zeros(len(states), num_rows + 1, num_quantiles)
    for start in range(0, len(keep_BT), sequences):
        chunk = slice(start, start + sequences)
        size = len(keep_BT[chunk])
        states_CRM, packed_CQM = states[:size], packed[:size]
        take_rows(quantiles_BTM[chunk], rows.source_BR[chunk], out=states_CRM)
        states_CRM[:, -1] = torch.where(rows.is_end_B[chunk, None], states_CRM[:, -1], ends_BM[chunk])
        _packed_targets(states_CRM, rewards_BS1[chunk], gamma, lam, delta_clip, out=packed_CQM[:, :-1])
        take_rows(packed_CQM, rows.row_BT[chunk], out=targets_BTM[chunk])
        if advantages_BTM is not None:
            packed_CQM[:, :-1].sub_(states_CRM)
            take_rows(packed_CQM, rows.row_BT[chunk], out=advantages_BTM[chunk])
    return targets_BTM


def _packed_targets(
    states_BRM: Tensor, rewards_BS1: Tensor, gamma: float, lam: float, delta_clip: float | None, out: Tensor
) -> None:
    """The targets [B,R,M] of R - 1 = S states and of the end, which is its own."""
    now_BSM, next_BSM, end_BM = states_BRM[:, :-1], states_BRM[:, 1:], states_BRM[:, -1]
    out[:, -1] = end_BM
    if delta_clip is None:
        # Only convex combinations: targets that are equal, as all are at lam = 1, come out equal to the last digit.
        terms_BSM = torch.add(rewards_BS1, next_BSM, alpha=gamma * (1 - lam), out=out[:, :-1])
        if gamma * lam > 0:
            discounted_scan_(terms_BSM, end_BM, gamma * lam)
    else:
        deltas_BSM = torch.add(rewards_BS1, next_BSM, alpha=gamma).sub_(now_BSM).clamp_(-delta_clip, delta_clip)
        discounted_scan_(deltas_BSM, torch.zeros_like(end_BM), gamma * lam)
        torch.add(now_BSM, deltas_BSM, out=out[:, :-1])


@torch.no_grad()
def mixture_targets(
    rewards: Tensor,
    quantiles: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    num_atoms: int,
    seed: int,
    bootstrap: Tensor | None = None,
    *,
    zero_last_delta: Tensor | None = None,
    tokens_before: int = 0,
) -> Tensor:
    """Draw equally weighted atoms from the true lambda-mixture of the laws of the n-step targets.

        law(G_t) = sum_{n=1}^{h} w_n law( sum_{i<n} gamma^i r_{t+i} + gamma^n theta_J(s_{t+n}) ),   J uniform,
        w_n = (1 - lam) lam^{n-1} for n < h, and lam^{h-1} for n = h;   h = policy tokens from t on

    Each token draws straight from this sum. (Resampling the atoms of t + 1 would be the other way; it hands
    its errors down the sequence, and at lam = 0.95 and L = M = 200 the mean of the atoms was off by twice as
    much.) Atom k takes n at the level k/L + u and J at the level k g/L + v, modulo 1: systematic sampling
    along both axes at once, on a rank-1 lattice (g prime to L and near its golden section, so that the two do
    not move together) shifted by uniform u and v. An atom of the mixture is expected L times its weight. For
    lam in {0, 1} only one n is left, and with L = M each of its quantiles is drawn exactly once.

    Args:
        rewards: [B,T], 0 at masked positions.
        quantiles: [B,T,M], equally weighted atoms of the value law at s_t, in any order; anything at masked
            positions.
        mask: [B,T], 1 on policy tokens.
        gamma: discount per policy token, in [0, 1].
        lam: weight of the longer returns, in [0, 1].
        num_atoms: L >= 1.
        seed: of the shifts, two for each policy token in turn; masked positions draw nothing.
        bootstrap: [B,M], as in `distributional_gae`.
        zero_last_delta: [B] bool, as in `gae`: the law at the last policy token is the critic's own.
        tokens_before: policy tokens of the batch that are on processes of lower rank; their draws are passed over,
            so that a token's atoms do not depend on the number of processes.

    Returns:
        targets [B,T,L] without gradient, in no order along L, 0 at masked positions. O(T L) time a sequence.

    Raises:
        ValueError: shapes do not fit, gamma or lam is out of range, a reward stands at a masked position, or
            num_atoms < 1.

    Source: the lambda-mixture is SR(lambda)'s, Nam et al. 2021; cf. DisPPO, ICML 2026.
    """
    quantiles_BTM, keep_BT = at_least_float32(quantiles), mask.bool()
    _check(rewards, quantiles_BTM, keep_BT, gamma, lam, bootstrap, zero_last_delta)
    if num_atoms < 1:
        raise ValueError(f"num_atoms must be at least 1, got {num_atoms}")
    # With values of 0 and lam = 1, GAE is the discounted sum of the rewards still to come; float64, for what is to come
    # at a landing is taken out again.
    zeros_BT = quantiles_BTM.new_zeros(keep_BT.shape, dtype=torch.float64)
    to_come_BT, _ = gae(rewards, zeros_BT, mask, gamma, 1.0, zero_last_delta=zero_last_delta)
    end_BM = torch.zeros_like(quantiles_BTM.sum(dim=1)) if bootstrap is None else bootstrap.to(quantiles_BTM)
    generator = torch.Generator().manual_seed(seed)
    torch.rand(2 * tokens_before, dtype=torch.float64, generator=generator)
    targets_BTL = quantiles_BTM.new_zeros(*keep_BT.shape, num_atoms)
    for b, keep_T in enumerate(keep_BT):
        unrewarded = zero_last_delta is not None and bool(zero_last_delta[b])
        states_HM = torch.cat([quantiles_BTM[b, keep_T], end_BM[b, None]]).sort(dim=-1).values
        to_come_H = torch.cat([to_come_BT[b, keep_T], to_come_BT.new_zeros(1)])
        targets_BTL[b, keep_T] = _draw_mixture(to_come_H, states_HM, gamma, lam, num_atoms, unrewarded, generator)
    return targets_BTL


def _draw_mixture(
    to_come_H: Tensor,
    states_HM: Tensor,
    gamma: float,
    lam: float,
    num_atoms: int,
    unrewarded: bool,
    generator: torch.Generator,
) -> Tensor:
    """The atoms [K,L] of one sequence of K policy tokens; H = K + 1 counts its end as a state."""
    device, (num_states, num_quantiles) = states_HM.device, states_HM.shape
    # float64: in float32 a level just below j / M may round up to it, and the next quantile is drawn twice.
    shifts_2K1 = torch.rand(num_states - 1, 2, 1, dtype=torch.float64, generator=generator).transpose(0, 1)
    position_shift_K1, level_shift_K1 = shifts_2K1.to(device)
    atom_L = torch.arange(num_atoms, dtype=torch.float64, device=device)
    position_KL = (atom_L / num_atoms + position_shift_K1) % 1.0
    level_KL = (atom_L * _lattice_generator(num_atoms) % num_atoms / num_atoms + level_shift_K1) % 1.0
    start_K1 = torch.arange(num_states - 1, device=device)[:, None]
    # A last token without a reward adds nothing: its state takes the place of the end.
    longest_K1 = num_states - 1 - int(unrewarded) - start_K1
    steps_KL = torch.minimum(_geometric_steps(position_KL, lam, num_states), longest_K1)
    landing_KL = start_K1 + steps_KL
    quantile_KL = (level_KL * num_quantiles).long().clamp(max=num_quantiles - 1)
    discount_KL = torch.pow(gamma, torch.arange(num_states, dtype=torch.float64, device=device))[steps_KL]
    between_KL = to_come_H[start_K1] - discount_KL * to_come_H[landing_KL]
    return (between_KL + discount_KL * states_HM[landing_KL, quantile_KL]).to(states_HM)


def _geometric_steps(position_KL: Tensor, lam: float, longest: int) -> Tensor:
    """The n with 1 - lam^{n-1} <= position < 1 - lam^n."""
    if lam in (0.0, 1.0):
        return torch.full_like(position_KL, 1 if lam == 0.0 else longest, dtype=torch.long)
    return 1 + (torch.log1p(-position_KL) / math.log(lam)).long()


def _lattice_generator(num_atoms: int) -> int:
    """The integer prime to L that is nearest to its golden section."""
    golden = num_atoms * (math.sqrt(5.0) - 1.0) / 2.0
    primes = (g for g in range(1, num_atoms + 1) if math.gcd(g, num_atoms) == 1)
    return min(primes, key=lambda g: abs(g - golden))


# Baselines from groups: one reward a response, several responses a prompt. The whole group must be on one
# process. (For the whole batch instead of groups: `masks.whiten(rewards, reward_mask)`.)


def group_mean_baseline(rewards: Tensor, groups: Tensor, reward_mask: Tensor) -> Tensor:
    """Reward less the mean of its group, A_b = r_b - mean(group).

    Args:
        rewards: [B]; anything where missing.
        groups: [B] integers, equal for the responses of one prompt.
        reward_mask: [B], 1 where there is a reward; a missing one counts in no mean.

    Returns:
        advantages [B], 0 where the reward is missing or its group has fewer than two.

    Raises:
        ValueError: the three are not one [B].

    Source: Dr. GRPO, Liu et al. 2025.
    """
    deviations_B, _, _ = _group_deviations(rewards, groups, reward_mask)
    return deviations_B


def leave_one_out(rewards: Tensor, groups: Tensor, reward_mask: Tensor) -> Tensor:
    """Reward less the mean of the *others* in its group, A_b = r_b - mean(group without b).

    Args, Returns, Raises: as `group_mean_baseline`.

    Source: RLOO, Ahmadian et al. 2024.
    """
    deviations_B, count_B, _ = _group_deviations(rewards, groups, reward_mask)
    return deviations_B * count_B / (count_B - 1).clamp(min=1)


def group_normalise(rewards: Tensor, groups: Tensor, reward_mask: Tensor) -> Tensor:
    """Reward normalised within its group, A_b = (r_b - mean(group)) / (sample std(group) + 1e-4).

    Args, Returns, Raises: as `group_mean_baseline`.

    Source: GRPO, Shao et al. 2024.
    """
    deviations_B, count_B, group_B = _group_deviations(rewards, groups, reward_mask)
    square_sum_B = _group_sum(deviations_B.square(), group_B)
    return deviations_B / ((square_sum_B / (count_B - 1).clamp(min=1)).sqrt() + GROUP_STD_EPS)


def group_rank(rewards: Tensor, groups: Tensor, reward_mask: Tensor) -> Tensor:
    """How often a reward beats the others of its group, A_b = P(r_b > r_o) + P(r_b = r_o)/2 - 1/2 over the others o.

    Args, Returns, Raises: as `group_mean_baseline`; the advantages lie in [-1/2, 1/2].

    Source: Mann and Whitney 1947; the group's counterpart of `dvpo.core.risk.rank_advantage`.
    """
    _, count_B, group_B = _group_deviations(rewards, groups, reward_mask)
    rewards_B = zero_masked(at_least_float32(rewards), reward_mask)
    keep_B = reward_mask.bool()
    pairs_BB = (group_B[:, None] == group_B[None, :]) & keep_B[:, None] & keep_B[None, :]
    # sign is +1 for a win, 0 for a tie (and for the pair with itself), -1 for a loss: half of it is what counts.
    signs_BB = (rewards_B[:, None] - rewards_B[None, :]).sign() * pairs_BB
    return signs_BB.sum(dim=-1) / 2 / (count_B - 1).clamp(min=1)


def group_location_scale(
    rewards: Tensor, groups: Tensor, reward_mask: Tensor, robust: bool = False
) -> tuple[Tensor, Tensor]:
    """Where the rewards of each group lie and how far they spread: what normalising a reward takes.

        mean and sample std;   robust: median and 1.4826 * median |r - median| (a Gaussian's std)

    Where more than half of a group agrees, as binary rewards often do, that median is 0 and says nothing of the spread:
    the robust scale is then the sample std as well.

    Args:
        rewards: [B]; anything where missing.
        groups: [B] integers, equal for the responses of one prompt.
        reward_mask: [B], 1 where there is a reward; a missing one counts in neither.
        robust: one outlier in a group then moves neither.

    Returns:
        (location, scale), [B], the same for every member; (0, 0) for a group without a reward. float64: far from 0 a
        location of float32 is off by as much as what tells rewards apart.

    Raises:
        ValueError: the three are not one [B].

    Source: Hampel 1974 for the robust form.
    """
    deviations_B, count_B, group_B = _group_deviations(rewards.double(), groups, reward_mask)
    values_B = zero_masked(rewards.double(), reward_mask)
    std_B = (_group_sum(deviations_B.square(), group_B) / (count_B - 1).clamp(min=1)).sqrt()
    if not robust:
        return _group_sum(values_B, group_B) / count_B.clamp(min=1), std_B
    location_B, scale_B = torch.zeros_like(values_B), torch.zeros_like(values_B)
    for group in group_B.unique():
        members_B = group_B == group
        present_R = values_B[members_B & reward_mask.bool()]
        if len(present_R):
            median = present_R.quantile(0.5)
            location_B[members_B] = median
            scale = 1.4826 * (present_R - median).abs().quantile(0.5)
            scale_B[members_B] = torch.where(scale > 0, scale, std_B[members_B])
    return location_B, scale_B


def _group_deviations(rewards: Tensor, groups: Tensor, reward_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reward less group mean, rewards in the group, group number 0..G-1), each [B]."""
    if rewards.dim() != 1 or not rewards.shape == groups.shape == reward_mask.shape:
        shapes = f"{tuple(rewards.shape)}, {tuple(groups.shape)}, {tuple(reward_mask.shape)}"
        raise ValueError(f"rewards, groups and reward_mask must be one [B], got {shapes}")
    rewards_B = zero_masked(at_least_float32(rewards), reward_mask)
    group_B = groups.unique(return_inverse=True)[1]
    count_B = _group_sum(reward_mask.bool().to(rewards_B.dtype), group_B)
    # A reward that is alone is its own mean: the deviation is exactly 0, and so is every advantage made of it.
    deviations_B = rewards_B
    for _ in range(2):  # far from 0 the first mean is rounded to few digits; the mean of what it left is exact
        mean_B = _group_sum(deviations_B, group_B) / count_B.clamp(min=1)
        deviations_B = zero_masked(deviations_B - mean_B, reward_mask)
    return deviations_B, count_B, group_B


def _group_sum(values_B: Tensor, group_B: Tensor) -> Tensor:
    """The sum over its group, at every member."""
    return torch.zeros_like(values_B).index_add_(0, group_B, values_B)[group_B]


def _check(
    rewards: Tensor,
    quantiles: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    zero_last_delta: Tensor | None,
) -> None:
    if quantiles.dim() != 3 or not rewards.shape == mask.shape == quantiles.shape[:2]:
        shapes = f"{tuple(rewards.shape)}, {tuple(mask.shape)}, {tuple(quantiles.shape)}"
        raise ValueError(f"rewards and mask must be [B,T] and quantiles [B,T,M], got {shapes}")
    num_sequences, _, num_quantiles = quantiles.shape
    if bootstrap is not None and bootstrap.shape != (num_sequences, num_quantiles):
        shapes = f"{tuple(bootstrap.shape)} for quantiles {tuple(quantiles.shape)}"
        raise ValueError(f"bootstrap must be [B,M] (scalar values: [B]), got {shapes}")
    if zero_last_delta is not None and zero_last_delta.shape != (num_sequences,):
        raise ValueError(f"zero_last_delta must be [{num_sequences}], got {tuple(zero_last_delta.shape)}")
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    if bool(((rewards != 0) & ~mask).any()):
        raise ValueError("a reward stands at a masked position: it must land on a policy token")
