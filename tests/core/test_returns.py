import json
import math
from pathlib import Path

import pytest
import torch
from closeness import DTYPES, F64, close
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.core.returns import (
    distributional_gae,
    gae,
    group_location_scale,
    group_mean_baseline,
    group_normalise,
    leave_one_out,
    mixture_targets,
)

pytestmark = pytest.mark.usefixtures("form")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["distributional_gae"]


# Golden numbers and a worked example


@DTYPES
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_numbers(case, dtype):
    bootstrap = None if case["bootstrap"] is None else torch.tensor([case["bootstrap"]], dtype=dtype)
    outputs = distributional_gae(
        torch.tensor([case["rewards"]], dtype=dtype),
        torch.tensor([case["quantiles"]], dtype=dtype),
        torch.tensor([case["mask"]]),
        case["gamma"],
        case["lam"],
        bootstrap,
    )
    for output_BTM, name in zip(outputs, ("advantages", "targets"), strict=True):
        close(output_BTM, [case[name]], dtype)


# Two policy turns with a user turn between them; the user's tokens hold rubbish.
#   values      .5   .6   user  .2        rewards 0  1  -  2,   gamma = .5, lam = .5, terminated
#   delta_3 = 2 + 0        - .2 = 1.8     A_3 = 1.8
#   delta_1 = 1 + .5 * .2  - .6 = .5      A_1 = .5 + .25 * 1.8 = .95
#   delta_0 = 0 + .5 * .6  - .5 = -.2     A_0 = -.2 + .25 * .95 = .0375
REWARDS = torch.tensor([[0.0, 1.0, 0.0, 2.0]], dtype=F64)
VALUES = torch.tensor([[0.5, 0.6, math.nan, 0.2]], dtype=F64)
MASK = torch.tensor([[1, 1, 0, 1]])
ADVANTAGES = torch.tensor([[0.0375, 0.95, 0.0, 1.8]], dtype=F64)
RETURNS = torch.tensor([[0.5375, 1.55, 0.0, 2.0]], dtype=F64)


def test_worked_example_skips_the_user_turn_and_discounts_policy_tokens_only():
    advantages_BT, returns_BT = gae(REWARDS, VALUES, MASK, 0.5, 0.5)
    torch.testing.assert_close(advantages_BT, ADVANTAGES)
    torch.testing.assert_close(returns_BT, RETURNS)


def test_worked_example_of_a_truncated_sequence():
    # Bootstrap 1: delta_3 = 2 + .5 * 1 - .2 = 2.3, so A_3 grows by .5, A_1 by .125, A_0 by .03125.
    advantages_BT, _ = gae(REWARDS, VALUES, MASK, 0.5, 0.5, torch.tensor([1.0], dtype=F64))
    grown_BT = torch.tensor([[0.03125, 0.125, 0.0, 0.5]], dtype=F64)
    torch.testing.assert_close(advantages_BT, ADVANTAGES + grown_BT)


# The definition, written out as a sum over the policy tokens that remain


def definition(rewards_K, quantiles_KM, gamma, lam, bootstrap_M):
    """A_t = sum_l (gamma lam)^l delta_{t+l} on the policy tokens alone."""
    next_KM = torch.cat([quantiles_KM[1:], bootstrap_M[None]])
    delta_KM = rewards_K[:, None] + gamma * next_KM - quantiles_KM
    advantages_KM = torch.zeros_like(quantiles_KM)
    for t in range(len(rewards_K)):
        for later in range(t, len(rewards_K)):
            advantages_KM[t] += (gamma * lam) ** (later - t) * delta_KM[later]
    return advantages_KM


def random_batch(seed, num_sequences=3, length=7, num_quantiles=4):
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(num_sequences, length, generator=generator) < 0.6
    rewards_BT = torch.where(mask_BT, torch.randn(mask_BT.shape, generator=generator, dtype=F64), 0.0)
    quantiles_BTM = torch.randn(num_sequences, length, num_quantiles, generator=generator, dtype=F64)
    bootstrap_BM = torch.randn(num_sequences, num_quantiles, generator=generator, dtype=F64)
    return rewards_BT, quantiles_BTM, mask_BT, bootstrap_BM


def agrees_with_the_definition(function, seed, gamma, lam):
    rewards_BT, quantiles_BTM, mask_BT, bootstrap_BM = random_batch(seed)
    advantages_BTM, targets_BTM = function(rewards_BT, quantiles_BTM, mask_BT, gamma, lam, bootstrap_BM)
    for b, keep_T in enumerate(mask_BT):
        state_KM = quantiles_BTM[b, keep_T]
        expected_KM = definition(rewards_BT[b, keep_T], state_KM, gamma, lam, bootstrap_BM[b])
        if not torch.allclose(advantages_BTM[b, keep_T], expected_KM, rtol=1e-9, atol=1e-9):
            return False
        if not torch.allclose(targets_BTM[b, keep_T], state_KM + expected_KM, rtol=1e-9, atol=1e-9):
            return False
    return bool((advantages_BTM[~mask_BT] == 0).all() and (targets_BTM[~mask_BT] == 0).all())


@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_recursion_equals_the_definition_on_random_masks(seed, gamma, lam):
    assert agrees_with_the_definition(distributional_gae, seed, gamma, lam)


def test_an_off_by_one_state_is_rejected():
    def reads_the_state_after_the_token(rewards_BT, quantiles_BTM, mask_BT, *settings_and_end):
        shifted_BTM = torch.cat([quantiles_BTM[:, 1:], settings_and_end[-1][:, None]], dim=1)
        return distributional_gae(rewards_BT, shifted_BTM, mask_BT, *settings_and_end)

    assert not agrees_with_the_definition(reads_the_state_after_the_token, 0, 1.0, 0.95)


def test_a_mask_that_is_not_skipped_is_rejected():
    def runs_through_masked_positions(rewards_BT, quantiles_BTM, mask_BT, *settings_and_end):
        outputs = distributional_gae(rewards_BT, quantiles_BTM, torch.ones_like(mask_BT), *settings_and_end)
        return tuple(torch.where(mask_BT[..., None], output_BTM, 0.0) for output_BTM in outputs)

    assert not agrees_with_the_definition(runs_through_masked_positions, 0, 1.0, 0.95)

    def takes_a_masked_position_for_the_end(rewards_BT, quantiles_BTM, mask_BT, *settings_and_end):
        zeroed_BTM = torch.where(mask_BT[..., None], quantiles_BTM, 0.0)
        return runs_through_masked_positions(rewards_BT, zeroed_BTM, mask_BT, *settings_and_end)

    assert not agrees_with_the_definition(takes_a_masked_position_for_the_end, 0, 1.0, 0.95)


# Reductions


@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_the_mean_over_quantiles_is_gae_on_the_mean_value(seed, gamma, lam):
    rewards_BT, quantiles_BTM, mask_BT, bootstrap_BM = random_batch(seed)
    outputs = distributional_gae(rewards_BT, quantiles_BTM, mask_BT, gamma, lam, bootstrap_BM)
    scalars = gae(rewards_BT, quantiles_BTM.mean(-1), mask_BT, gamma, lam, bootstrap_BM.mean(-1))
    for output_BTM, scalar_BT in zip(outputs, scalars, strict=True):
        torch.testing.assert_close(output_BTM.mean(-1), scalar_BT)


def test_lam_and_gamma_of_one_give_monte_carlo_returns_for_every_quantile():
    rewards_BT, quantiles_BTM, mask_BT, _ = random_batch(3)
    _, targets_BTM = distributional_gae(rewards_BT, quantiles_BTM, mask_BT, 1.0, 1.0)
    to_come_BT = rewards_BT.flip(1).cumsum(1).flip(1) * mask_BT
    torch.testing.assert_close(targets_BTM, to_come_BT[..., None].expand_as(targets_BTM))


def test_lam_of_zero_gives_the_one_step_target():
    rewards_BT, quantiles_BTM, _, bootstrap_BM = random_batch(4)
    full_BT = torch.ones(rewards_BT.shape)
    _, targets_BTM = distributional_gae(rewards_BT, quantiles_BTM, full_BT, 0.9, 0.0, bootstrap_BM)
    next_BTM = torch.cat([quantiles_BTM[:, 1:], bootstrap_BM[:, None]], dim=1)
    torch.testing.assert_close(targets_BTM, rewards_BT[..., None] + 0.9 * next_BTM)


@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_sorted_quantiles_give_sorted_targets(seed, gamma, lam):
    rewards_BT, quantiles_BTM, mask_BT, bootstrap_BM = random_batch(seed)
    sorted_BTM, end_BM = quantiles_BTM.sort(-1).values, bootstrap_BM.sort(-1).values
    _, targets_BTM = distributional_gae(rewards_BT, sorted_BTM, mask_BT, gamma, lam, end_BM)
    assert (targets_BTM.diff(dim=-1) >= -1e-12).all()


# Masks


def spread_out(values, positions, length, junk):
    """Put the T positions of a batch among `length`, with junk between them."""
    out = torch.full((values.shape[0], length, *values.shape[2:]), junk, dtype=values.dtype)
    out[:, positions] = values
    return out


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_padding_and_user_turns_change_nothing_whatever_they_hold(junk):
    rewards_BT, quantiles_BTM, _, bootstrap_BM = random_batch(5, length=4)
    positions, length = torch.tensor([2, 3, 6, 7]), 10  # leading, inner and trailing masked positions
    mask_BT = torch.zeros(3, length)
    mask_BT[:, positions] = 1
    rewards_wide_BT = spread_out(rewards_BT, positions, length, 0.0)
    quantiles_wide_BTM = spread_out(quantiles_BTM, positions, length, junk)
    short = (rewards_BT, quantiles_BTM, torch.ones(3, 4))
    wide = (rewards_wide_BT, quantiles_wide_BTM, mask_BT)
    for silent_B in (None, torch.tensor([True, False, True])):
        expected = distributional_gae(*short, 0.9, 0.8, bootstrap_BM, zero_last_delta=silent_B)
        outputs = distributional_gae(*wide, 0.9, 0.8, bootstrap_BM, zero_last_delta=silent_B)
        for output_BTM, expected_BTM in zip(outputs, expected, strict=True):
            assert torch.equal(output_BTM, spread_out(expected_BTM, positions, length, 0.0))
        atoms_BTL = mixture_targets(*short, 0.9, 0.8, 8, 0, bootstrap_BM, zero_last_delta=silent_B)
        wide_BTL = mixture_targets(*wide, 0.9, 0.8, 8, 0, bootstrap_BM, zero_last_delta=silent_B)
        assert torch.equal(wide_BTL, spread_out(atoms_BTL, positions, length, 0.0))


def test_a_sequence_without_policy_tokens_is_zero_and_may_hold_anything():
    nan_BTM = torch.full((1, 3, 2), math.nan)
    empty = (torch.zeros(1, 3), nan_BTM, torch.zeros(1, 3))
    outputs = [
        *distributional_gae(*empty, 1.0, 0.95, nan_BTM[:, 0]),
        mixture_targets(*empty, 1.0, 0.95, 4, 0, nan_BTM[:, 0]),
    ]
    for output in outputs:
        assert torch.equal(output, torch.zeros_like(output))


def test_no_positions_at_all_are_no_error():
    advantages_BTM, targets_BTM = distributional_gae(torch.zeros(2, 0), torch.zeros(2, 0, 3), torch.zeros(2, 0), 1, 1)
    assert advantages_BTM.shape == targets_BTM.shape == (2, 0, 3)
    atoms_BTL = mixture_targets(torch.zeros(2, 0), torch.zeros(2, 0, 3), torch.zeros(2, 0), 1, 1, 5, 0)
    assert atoms_BTL.shape == (2, 0, 5)


# A missing final reward


def test_a_missing_final_reward_leaves_the_critics_opinion_standing():
    # The worked example without its last reward: delta_3 = 0, A_3 = 0, G_3 = V_3 = .2;
    # A_1 = delta_1 = .5, A_0 = -.2 + .25 * .5 = -.075. The row that has its reward is as before.
    rewards_BT = torch.cat([REWARDS, REWARDS])
    rewards_BT[0, 3] = math.nan
    advantages_BT, returns_BT = gae(
        rewards_BT,
        VALUES.expand(2, -1),
        MASK.expand(2, -1),
        0.5,
        0.5,
        torch.tensor([7.0, 0.0], dtype=F64),  # whatever the bootstrap says
        zero_last_delta=torch.tensor([True, False]),
    )
    torch.testing.assert_close(advantages_BT[0], torch.tensor([-0.075, 0.5, 0.0, 0.0], dtype=F64))
    torch.testing.assert_close(returns_BT[0], torch.tensor([0.425, 1.1, 0.0, 0.2], dtype=F64))
    torch.testing.assert_close(advantages_BT[1], ADVANTAGES[0])
    # It does not count as a reward of 0, which would be A_3 = -.2.
    counted_as_zero_BT, _ = gae(rewards_BT.nan_to_num(0.0)[:1], VALUES, MASK, 0.5, 0.5)
    assert counted_as_zero_BT[0, 3].item() == pytest.approx(-0.2)


# Mixture targets


def brute_force(rewards_K, quantiles_KM, gamma, lam, end_M, *, t):
    """All weighted atoms of the lambda-mixture at t, by enumerating the n-step targets."""
    states_HM = torch.cat([quantiles_KM, end_M[None]])
    horizon = len(rewards_K) - t
    atoms, weights = [], []
    for n in range(1, horizon + 1):
        reward_sum = sum(gamma**i * rewards_K[t + i].item() for i in range(n))
        weight = lam ** (n - 1) * (1 - lam if n < horizon else 1.0)
        atoms.append(reward_sum + gamma**n * states_HM[t + n])
        weights.append(torch.full_like(end_M, weight / len(end_M)))
    return torch.cat(atoms), torch.cat(weights)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 0.05), (0.0, 0.5)])
def test_mixture_atoms_follow_the_enumerated_law(gamma, lam):
    rewards_BT, quantiles_BTM, _, end_BM = random_batch(6, num_sequences=1, length=5)
    num_atoms = 4000
    arguments = (rewards_BT, quantiles_BTM, torch.ones(1, 5), gamma, lam, num_atoms, 1, end_BM)
    targets_BTL = mixture_targets(*arguments)
    for t in range(5):
        atoms, weights = brute_force(rewards_BT[0], quantiles_BTM[0], gamma, lam, end_BM[0], t=t)
        drawn_L = targets_BTL[0, t]
        # Nothing but atoms of the mixture is drawn, ...
        assert (drawn_L[:, None] - atoms).abs().amin(-1).max() < 1e-9
        # ... and the distribution function is met to within a few of 4000 atoms (independent draws: 60).
        share = (drawn_L[:, None] <= atoms + 1e-9).double().mean(0)
        exact = (weights * (atoms <= atoms[:, None] + 1e-9)).sum(-1)
        assert (share - exact).abs().max() < 10 / num_atoms
        assert abs(drawn_L.mean() - (weights * atoms).sum()) < 2e-3


# Tolerance: four standard errors at most.
@pytest.mark.parametrize(("num_atoms", "seeds", "tolerance"), [(1, 1000, 0.05), (3, 4000, 0.012)])
def test_every_atom_is_expected_its_weight(num_atoms, seeds, tolerance):
    # 3 tokens, few atoms, many seeds: the mean over seeds meets the exact mean to Monte Carlo accuracy even
    # though L = 3 atoms, or 1, cannot hold the 6 of the mixture. One shift for both axes would be seen at L = 1.
    rewards_BT, quantiles_BTM, _, end_BM = random_batch(8, num_sequences=1, length=3, num_quantiles=2)
    batch = (rewards_BT.expand(seeds, -1), quantiles_BTM.expand(seeds, -1, -1), torch.ones(seeds, 3))
    targets_BTL = mixture_targets(*batch, 0.9, 0.6, num_atoms, 0, end_BM.expand(seeds, -1))
    atoms, weights = brute_force(rewards_BT[0], quantiles_BTM[0], 0.9, 0.6, end_BM[0], t=0)
    share = ((targets_BTL[:, 0, :, None] - atoms).abs() < 1e-9).double().mean((0, 1))
    torch.testing.assert_close(share, weights, rtol=0, atol=tolerance)
    spread = targets_BTL[:, 0].mean(-1).std() / seeds**0.5
    assert abs(targets_BTL[:, 0].mean() - (weights * atoms).sum()) < 4 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_is_exact_at_both_ends_of_lambda(dtype):
    batch = random_batch(9, length=30, num_quantiles=50)
    rewards_BT, quantiles_BTM, mask_BT, end_BM = (tensor.to(dtype) for tensor in batch)
    sorted_BTM, end_BM = quantiles_BTM.sort(-1).values, end_BM.sort(-1).values
    for lam in (0.0, 1.0):
        for bootstrap in (None, end_BM):
            _, expected_BTM = distributional_gae(rewards_BT, sorted_BTM, mask_BT, 0.9, lam, bootstrap)
            targets_BTL = mixture_targets(rewards_BT, sorted_BTM, mask_BT, 0.9, lam, 50, 3, bootstrap)
            torch.testing.assert_close(targets_BTL.sort(-1).values, expected_BTM, rtol=1e-5, atol=1e-5)


def test_mixture_keeps_the_spread_that_the_indexwise_target_averages_away():
    # The states of a long sequence are worth 0 and 1 in turn, for sure. Seen from state 0 (far from the end),
    # n-step targets with odd n are worth 1, and weigh .1 (1 + .81 + .81^2 + ...) = .1 / .19 = .5263 together.
    quantiles_BTM = (torch.arange(400) % 2).double()[None, :, None].expand(1, 400, 50)
    arguments = (torch.zeros(1, 400), quantiles_BTM, torch.ones(1, 400), 1.0, 0.9)
    _, indexwise_BTM = distributional_gae(*arguments)
    one_point_M = torch.full((50,), 0.1 / 0.19, dtype=F64)
    torch.testing.assert_close(indexwise_BTM[0, 0], one_point_M)
    drawn_L = mixture_targets(*arguments, 200, 0)[0, 0]
    assert set(drawn_L.tolist()) == {0.0, 1.0}
    assert drawn_L.mean().item() == pytest.approx(0.1 / 0.19, abs=0.02)


def test_mixture_gives_the_critics_own_law_where_the_last_reward_is_missing():
    rewards_BT, quantiles_BTM, _, end_BM = random_batch(10, num_sequences=2, length=6, num_quantiles=16)
    rewards_BT[0, -1] = math.nan
    missing_B, full_BT = torch.tensor([True, False]), torch.ones(2, 6)
    arguments = (rewards_BT, quantiles_BTM, full_BT, 0.9, 0.7)
    targets_BTL = mixture_targets(*arguments, 16, 0, end_BM, zero_last_delta=missing_B)
    torch.testing.assert_close(targets_BTL[0, -1].sort().values, quantiles_BTM[0, -1].sort().values)
    fine_BTL = mixture_targets(*arguments, 4000, 0, end_BM, zero_last_delta=missing_B)
    _, indexwise_BTM = distributional_gae(*arguments, end_BM, zero_last_delta=missing_B)
    torch.testing.assert_close(fine_BTL.mean(-1), indexwise_BTM.mean(-1), rtol=0, atol=3e-3)


@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_an_outlier_in_the_reward_leaves_atoms_alone_that_do_not_meet_it(gamma):
    # One seed draws the same landings: what lands before the end has no reward in it, what lands there has 1e7 gamma^n.
    quantiles_BTM = 0.2 + 0.6 * torch.rand(1, 30, 16, generator=torch.Generator().manual_seed(0))
    rewards_BT = torch.zeros(1, 30)
    without_BTL = mixture_targets(rewards_BT, quantiles_BTM, torch.ones(1, 30), gamma, 0.9, 32, 0)
    rewards_BT[0, -1] = 1e7
    with_BTL = mixture_targets(rewards_BT, quantiles_BTM, torch.ones(1, 30), gamma, 0.9, 32, 0)
    before_end_BTL = without_BTL > 0
    assert 0.5 < before_end_BTL.float().mean() < 0.95
    torch.testing.assert_close(with_BTL[before_end_BTL], without_BTL[before_end_BTL], rtol=1e-6, atol=1e-6)
    assert (with_BTL[~before_end_BTL] > 7e6).all()  # 1e7 * .99^30 = 7.4e6


def test_mixture_depends_on_its_seed_and_on_nothing_else():
    arguments = random_batch(11)[:3]
    first, again, other = (mixture_targets(*arguments, 1.0, 0.9, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mixture_draws_for_a_token_what_it_would_draw_on_one_process():
    rewards_BT, quantiles_BTM, mask_BT, end_BM = random_batch(11)
    whole_BTL = mixture_targets(rewards_BT, quantiles_BTM, mask_BT, 1.0, 0.9, 8, 1, end_BM)
    later = (tensor[1:] for tensor in (rewards_BT, quantiles_BTM, mask_BT))
    before = int(mask_BT[0].sum())
    assert before > 0
    later_BTL = mixture_targets(*later, 1.0, 0.9, 8, 1, end_BM[1:], tokens_before=before)
    assert torch.equal(later_BTL, whole_BTL[1:])


# Groups


def test_group_baselines_worked_example():
    # Group 7: rewards 1, 0, 2 (and one missing): mean 1, deviations 0, -1, 1, sample deviation 1.
    #   leave one out: 1 - (0+2)/2 = 0, 0 - (1+2)/2 = -1.5, 2 - (1+0)/2 = 1.5
    # Group 3 has one reward left and gives 0.
    rewards_B = torch.tensor([1.0, 5.0, 0.0, math.nan, 2.0, math.nan])
    groups_B = torch.tensor([7, 3, 7, 7, 7, 3])
    present_B = torch.tensor([1, 1, 1, 0, 1, 0])
    arguments = (rewards_B, groups_B, present_B)
    torch.testing.assert_close(group_mean_baseline(*arguments), torch.tensor([0.0, 0, -1, 0, 1, 0]))
    torch.testing.assert_close(leave_one_out(*arguments), torch.tensor([0.0, 0, -1.5, 0, 1.5, 0]))
    torch.testing.assert_close(group_normalise(*arguments), torch.tensor([0.0, 0, -1, 0, 1, 0]) / (1 + 1e-4))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_group_baselines_equal_a_loop_over_groups(seed):
    generator = torch.Generator().manual_seed(seed)
    groups_B = torch.randint(-2, 3, (12,), generator=generator)
    rewards_B = torch.randn(12, generator=generator, dtype=F64)
    present_B = torch.rand(12, generator=generator) < 0.7
    expected = torch.zeros(3, 12, dtype=F64)
    for b in range(12):
        member_B = (groups_B == groups_B[b]) & present_B
        if present_B[b] and member_B.sum() >= 2:
            others_B = member_B & (torch.arange(12) != b)
            deviation = rewards_B[b] - rewards_B[member_B].mean()
            expected[0, b] = deviation
            expected[1, b] = rewards_B[b] - rewards_B[others_B].mean()
            expected[2, b] = deviation / (rewards_B[member_B].std() + 1e-4)
    dirty_B = torch.where(present_B, rewards_B, math.nan)
    for function, row_B in zip((group_mean_baseline, leave_one_out, group_normalise), expected, strict=True):
        torch.testing.assert_close(function(dirty_B, groups_B, present_B), row_B)


@pytest.mark.parametrize("size", [4, 7, 8])
@pytest.mark.parametrize("reward", [0.7, 87.3, 20000.3])
def test_a_group_of_equal_rewards_gives_zero(reward, size):
    # The float32 mean of eight times 20000.3 is an ulp, .002, off: so would be every deviation, and the std.
    arguments = torch.full((size,), reward), torch.zeros(size).long(), torch.ones(size)
    for advantage in (group_mean_baseline, leave_one_out, group_normalise):
        assert (advantage(*arguments) == 0).all()
    location_B, scale_B = group_location_scale(*arguments)
    assert (location_B == arguments[0]).all()
    assert (scale_B == 0).all()


def test_groups_far_from_0_keep_what_tells_their_rewards_apart():
    # At 10,000 float32 knows multiples of .00098, a tenth of the spread: the mean lies between two of them.
    rewards_B = 1e4 + 0.01 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    exact_B = rewards_B.double() - rewards_B.double().mean()
    arguments = rewards_B, torch.zeros(8).long(), torch.ones(8)
    torch.testing.assert_close(group_mean_baseline(*arguments), exact_B.float(), rtol=1e-6, atol=1e-8)
    expected_B = exact_B / (exact_B.square().sum() / 7).sqrt().add(1e-4)
    torch.testing.assert_close(group_normalise(*arguments), expected_B.float(), rtol=1e-6, atol=1e-6)


# Dtypes, gradients, bad input


def test_outputs_carry_no_gradient_and_bf16_is_computed_in_float32():
    values_BT = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    # 1 + 2^-9 is 1 in bf16: the return would lose the second reward.
    rewards_BT = torch.tensor([[1.0, 2**-9]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, torch.ones(1, 2), 1.0, 1.0)
    assert returns_BT.dtype == torch.float32
    assert returns_BT[0, 0].item() == 1.0 + 2**-9
    assert not advantages_BT.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, q, m: distributional_gae(r[:, 1:], q, m, 1, 1), "rewards and mask"),
        (lambda r, q, m: distributional_gae(r, q[0], m, 1, 1), "rewards and mask"),
        (lambda r, q, m: gae(r, q, m, 1, 1), "values must be"),
        (lambda r, q, m: distributional_gae(r, q, m, 1.5, 1), "gamma"),
        (lambda r, q, m: distributional_gae(r, q, m, 1, -0.1), "lam"),
        (lambda r, q, m: distributional_gae(r, q, m, 1, math.nan), "lam"),
        (lambda r, q, m: distributional_gae(r, q, m, 1, 1, torch.zeros(2)), "bootstrap"),
        (
            lambda r, q, m: distributional_gae(r, q, m, 1, 1, zero_last_delta=torch.zeros(3)),
            "zero_last_delta",
        ),
        (lambda r, q, m: distributional_gae(r + 1, q, m, 1, 1), "masked position"),
        (lambda r, q, m: distributional_gae(r * math.nan, q, m, 1, 1), "masked position"),
        (lambda r, q, m: mixture_targets(r, q, m, 1, 1, 0, 0), "num_atoms"),
        (lambda r, q, m: group_mean_baseline(r, r, r), "one \\[B\\]"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_is_wrong(call, message):
    mask_BT = torch.tensor([[1, 0, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.zeros(2, 3, 4), mask_BT)
