import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpo.core.quantiles import quantile_levels
from dvpo.core.returns import distributional_gae, gae
from dvpo.core.risk import (
    critic_terms,
    cvar,
    cvar_weights,
    noise_corrected_reward,
    noise_corrected_value,
    rank_advantage,
    spectral_value,
    trimmed_mean,
    trimmed_weights,
    tv_weights,
    tv_worst_case,
    upper_mean,
    upper_weights,
    wang,
    wang_weights,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
TERMS = ["qr", "risk", "cvar", "gain", "shift", "shape", "curvature", "consistency"]
F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def close(actual, expected, dtype=F64):
    expected = torch.as_tensor(expected, dtype=dtype)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# The critic's terms


@DTYPES
@pytest.mark.parametrize("case", GOLDEN["critic_terms"])
def test_golden_critic_terms(case, dtype):
    predictions = torch.tensor(case["theta"], dtype=dtype, requires_grad=True)
    targets, levels = torch.tensor(case["G"], dtype=dtype), torch.tensor(case["tau"], dtype=dtype)
    terms = critic_terms(predictions, targets, levels, case["kappa"], case["eta"], case["alpha"], case["beta"])
    assert list(terms) == TERMS
    for name, expected in case["terms"].items():
        close(terms[name], expected, dtype)
    terms["qr"].backward()
    if "qr_gradient" in case:
        close(predictions.grad, case["qr_gradient"], dtype)


def test_critic_terms_worked_example():
    # Heads (0, 4, 2) and (2, 0, 4): theta = (1, 2, 3), sorted. G = (1, 1, 7). alpha = .5, beta = .1 of 3 atoms: low
    # takes 2, up takes 1.
    #   cvar   ((1 + 2)/2 - (1 + 1)/2)^2 = .25         gain   (3 - 7)^2 = 16
    #   shift  relu(3 - 2) = 1                         shape  relu(.25 - 0) + relu(0 - 0) = .25
    #   curvature  D_2 = 3 - 4 + 1 = 0                 consistency  (4 + 16 + 4) / 3 = 8
    # qr with kappa = 0: sum over heads, levels (1/6, 1/2, 5/6) and G of |tau - 1{u<0}| |u|, over 2 * 9:
    #   tau 1/6: theta 0: (1 + 1 + 7)/6;           theta 2: 5/6 (1 + 1) + 5/6        sum 9/6 + 15/6 = 4
    #   tau 1/2: theta 4: (3 + 3 + 3)/2;           theta 0: (1 + 1 + 7)/2            sum 9
    #   tau 5/6: theta 2: (1 + 1)/6 + 25/6;        theta 4: (3 + 3)/6 + 15/6         sum 27/6 + 21/6 = 8
    #   (4 + 9 + 8) / 18 = 7/6
    # risk with eta = 6 log 2: exp(-eta tau) = 1/2, 1/8, 1/32, weights 48/21, 12/21, 3/21:
    #   (4 * 48 + 9 * 12 + 8 * 3) / 21 / 18 = 324 / 378 = 6/7
    predictions = torch.tensor([[0.0, 4.0, 2.0], [2.0, 0.0, 4.0]], dtype=F64)
    targets = torch.tensor([1.0, 7.0, 1.0], dtype=F64)
    levels = torch.tensor([1 / 6, 1 / 2, 5 / 6], dtype=F64)
    terms = critic_terms(predictions, targets, levels, 0.0, 6 * math.log(2), 0.5, 0.1)
    expected = dict(zip(TERMS, (7 / 6, 6 / 7, 0.25, 16.0, 1.0, 0.25, 0.0, 8.0), strict=True))
    for name, value in expected.items():
        close(terms[name], value)


def test_curvature_worked_example():
    # theta = (0, 3, 4, 5, 9, 10): D = (-2, 0, 3, -3); alpha = .5 takes D's first 2, beta = .25 its last 1:
    # (2 + 0)/2 + 3 = 4.
    theta = torch.tensor([[0.0, 3.0, 4.0, 5.0, 9.0, 10.0]], dtype=F64)
    terms = critic_terms(theta, theta[0], quantile_levels(6, dtype=F64), 0.1, 2.0, 0.5, 0.25)
    close(terms["curvature"], 4.0)


def test_a_tail_takes_no_further_atom_for_a_rounding_error():
    # .07 * 100 is 7.000000000000001 in floating point, yet the lowest tail has 7 atoms: mean of 0..6 = 3, squared 9.
    predictions = torch.arange(100, dtype=F64)[None]
    terms = critic_terms(predictions, torch.zeros(1, dtype=F64), quantile_levels(100, dtype=F64), 0.1, 2.0, 0.07, 0.1)
    close(terms["cvar"], 9.0)


def reference_terms(predictions, targets, levels, kappa, eta, alpha, beta):
    """Section 4 of the method, read aloud: loops and lists, one token."""
    num_heads, num_levels = predictions.shape
    target_list = sorted(targets.unbind(), key=Tensor.item)
    theta = sorted(predictions.mean(0).unbind(), key=Tensor.item)

    def rho(tau, u):
        huber = u**2 / (2 * kappa) if kappa and abs(u) <= kappa else abs(u) - kappa / 2
        return abs(tau - (1.0 if u < 0 else 0.0)) * huber

    def ceil(x):
        return max(1, math.ceil(x - 1e-9))

    def mean(items):
        return sum(items) / len(items)

    def variance(items):
        return mean([(item - mean(items)) ** 2 for item in items])

    def relu(x):
        return x if x > 0 else 0.0 * x

    raw = [math.exp(-eta * tau) for tau in levels.tolist()]
    rows = [
        [mean([rho(levels[j], g - predictions[i, j]) for g in target_list]) for j in range(num_levels)]
        for i in range(num_heads)
    ]
    low, up = theta[: ceil(alpha * num_levels)], theta[-ceil(beta * num_levels) :]
    target_low = target_list[: ceil(alpha * len(target_list))]
    target_up = target_list[-ceil(beta * len(target_list)) :]
    bends = [relu(-(theta[j + 1] - 2 * theta[j] + theta[j - 1])) for j in range(1, num_levels - 1)]
    pairs = list(itertools.combinations(range(num_heads), 2))
    zero = 0.0 * predictions.sum()
    return {
        "qr": mean([mean(row) for row in rows]),
        "risk": mean([mean([w / mean(raw) * x for w, x in zip(raw, row, strict=True)]) for row in rows]),
        "cvar": (mean(low) - mean(target_low)) ** 2,
        "gain": (mean(up) - mean(target_up)) ** 2,
        "shift": relu(mean(target_list) - mean(theta)),
        "shape": relu(variance(low) - variance(target_low)) + relu(variance(target_up) - variance(up)),
        "curvature": mean(bends[: ceil(alpha * len(bends))]) + mean(bends[-ceil(beta * len(bends)) :])
        if bends
        else zero,
        "consistency": mean([(predictions[i, j] - predictions[k, j]) ** 2 for i, k in pairs for j in range(num_levels)])
        if pairs
        else zero,
    }


@st.composite
def tokens(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_heads, num_levels, num_targets = (draw(st.integers(1, top)) for top in (3, 7, 6))
    # Continuous draws: kinks and ties have probability 0.
    predictions = torch.randn(num_heads, num_levels, generator=generator, dtype=F64)
    targets = torch.randn(num_targets, generator=generator, dtype=F64)
    kappa = draw(st.sampled_from([0.0, 0.1, 1.0]))
    alpha, beta = (draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])) for _ in range(2))
    return predictions, targets, quantile_levels(num_levels, dtype=F64), kappa, 2.0, alpha, beta


@given(token=tokens())
@settings(max_examples=40, deadline=None)
def test_terms_and_gradients_equal_the_definition_read_aloud(token):
    predictions, *others = token
    ours, theirs = predictions.clone().requires_grad_(), predictions.clone().requires_grad_()
    terms, reference = critic_terms(ours, *others), reference_terms(theirs, *others)
    for name in TERMS:
        close(terms[name].detach(), reference[name].detach())
    for name in TERMS:
        if terms[name].requires_grad:
            (gradient,) = torch.autograd.grad(terms[name], ours, retain_graph=True, allow_unused=True)
            (expected,) = torch.autograd.grad(reference[name], theirs, retain_graph=True)
            close(torch.zeros_like(ours) if gradient is None else gradient, expected)
        else:
            assert terms[name] == 0


@pytest.mark.parametrize("name", TERMS)
def test_gradients_of_every_term_equal_finite_differences(name):
    generator = torch.Generator().manual_seed(13)
    # A wide, top-heavy target and an ensemble below it, so that no term is zero; far from kinks at this seed.
    predictions = torch.randn(2, 3, 9, generator=generator, dtype=F64).requires_grad_()
    targets = torch.randn(2, 8, generator=generator, dtype=F64) ** 3 + 1.0
    levels = quantile_levels(9, dtype=F64)

    def term(theta):
        return critic_terms(theta, targets, levels, 0.1, 2.0, 0.3, 0.4)[name]

    assert (term(predictions) != 0).any()
    assert torch.autograd.gradcheck(term, (predictions,), eps=1e-7, atol=1e-6)


def test_each_token_of_a_batch_has_the_terms_it_would_have_alone():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(2, 3, 4, 10, generator=generator, dtype=F64)
    targets = torch.randn(2, 3, 6, generator=generator, dtype=F64)
    settings_ = (quantile_levels(10, dtype=F64), 0.1, 2.0, 0.2, 0.1)
    together = critic_terms(predictions, targets, *settings_)
    for b, t in itertools.product(range(2), range(3)):
        alone = critic_terms(predictions[b, t], targets[b, t], *settings_)
        for name in TERMS:
            close(together[name][b, t], alone[name])


def test_a_tail_of_one_atom_has_variance_zero_and_a_finite_gradient():
    predictions = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    terms = critic_terms(predictions, torch.tensor([1.0]), quantile_levels(4), 0.1, 2.0, 0.1, 0.1)
    sum(terms.values()).backward()
    assert terms["shape"] == 0.0
    assert predictions.grad.isfinite().all()


def test_one_head_and_few_quantiles_switch_off_consistency_and_curvature():
    terms = critic_terms(torch.tensor([[1.0, -5.0]]), torch.tensor([0.0]), quantile_levels(2), 0.1, 2.0, 0.1, 0.1)
    assert terms["curvature"] == 0.0
    assert terms["consistency"] == 0.0


def test_gradient_flows_to_the_predictions_only_and_targets_may_come_unsorted():
    generator = torch.Generator().manual_seed(1)
    predictions = torch.randn(3, 8, generator=generator, requires_grad=True)
    targets = torch.randn(6, generator=generator, requires_grad=True)
    arguments = (quantile_levels(8), 0.1, 2.0, 0.3, 0.3)
    terms = critic_terms(predictions, targets, *arguments)
    sum(terms.values()).backward()
    assert targets.grad is None
    for name, value in critic_terms(predictions, targets.flip(0), *arguments).items():
        torch.testing.assert_close(value, terms[name])


def test_terms_keep_their_digits_in_float32_when_rewards_are_offset_by_ten_thousand():
    generator = torch.Generator().manual_seed(2)
    # Multiples of 1/512 are exact at 1e4 in float32: any difference is ours.
    predictions = torch.randint(-512, 512, (5, 3, 20), generator=generator) / 512.0
    targets = torch.randint(-512, 512, (5, 20), generator=generator) / 512.0
    arguments = (quantile_levels(20), 0.1, 2.0, 0.2, 0.2)
    exact = critic_terms(predictions.double(), targets.double(), arguments[0].double(), *arguments[1:])
    for name, value in critic_terms(predictions + 1e4, targets + 1e4, *arguments).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-6)


def test_bf16_predictions_are_computed_in_float32():
    predictions = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    terms = critic_terms(predictions, torch.ones(3), quantile_levels(4), 0.1, 2.0, 0.1, 0.1)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    assert predictions.grad.dtype == torch.bfloat16


# Risk functionals


@DTYPES
def test_golden_risk_functionals(dtype):
    (case,) = GOLDEN["risk"]
    atoms = torch.tensor(case["atoms"], dtype=dtype)
    shuffled = atoms[torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    functions = {"cvar": cvar, "upper": upper_mean, "tv_worst": tv_worst_case, "wang": wang}
    for name, function in functions.items():
        for argument, expected in case[name].items():
            close(function(shuffled, float(argument)), expected, dtype)
    for row in case["trimmed"]:
        close(trimmed_mean(shuffled, row["lo"], row["hi"]), row["value"], dtype)


def test_risk_functionals_split_an_atom_exactly():
    # Atoms 0, 1, 2, 10 of mass 1/4.
    #   cvar(.375)          (1/4 * 0 + 1/8 * 1) / (3/8)          = 1/3
    #   upper_mean(.375)    (1/4 * 10 + 1/8 * 2) / (3/8)         = 22/3
    #   trimmed(.125, .25)  (1/8 * 0 + 1/4 * 1 + 1/4 * 2) / (5/8) = 6/5
    #   tv_worst(.375)      3/8 of the mass from the top to the minimum: 5/8 * 0 + 1/4 * 1 + 1/8 * 2 = 1/2
    atoms = torch.tensor([[10.0, 1.0, 0.0, 2.0]], dtype=F64)
    close(cvar(atoms, 0.375), [1 / 3])
    close(upper_mean(atoms, 0.375), [22 / 3])
    close(trimmed_mean(atoms, 0.125, 0.25), [1.2])
    close(tv_worst_case(atoms, 0.375), [0.5])
    # Whole atoms, as in the critic's terms, would be another number: ceil(.375 * 4) = 2 atoms, (0 + 1) / 2.
    assert cvar(atoms, 0.5).item() == 0.5


def piecewise_integral(atoms, density, points=50_000):
    """The mean of density(level) * quantile(level) on a fine grid of levels: no atoms, no weights."""
    levels = (torch.arange(points, dtype=F64) + 0.5) / points
    values = atoms.sort().values[(levels * len(atoms)).long()]
    return (density(levels) * values).mean()


@given(seed=st.integers(0, 2**31), num_atoms=st.integers(1, 9), a=st.floats(0.05, 1), b=st.floats(0, 0.45))
@settings(max_examples=15, deadline=None)
def test_functionals_are_integrals_over_the_quantile_function(seed, num_atoms, a, b):
    atoms = torch.randn(num_atoms, generator=torch.Generator().manual_seed(seed), dtype=F64)
    low, high = atoms.min(), atoms.max()
    pairs = [
        (cvar(atoms, a), piecewise_integral(atoms, lambda p: (p < a) / a)),
        (upper_mean(atoms, a), piecewise_integral(atoms, lambda p: (p > 1 - a) / a)),
        (trimmed_mean(atoms, b, 0.4), piecewise_integral(atoms, lambda p: ((p > b) & (p < 0.6)) / (0.6 - b))),
        (tv_worst_case(atoms, 1 - a), piecewise_integral(atoms, lambda p: p < a) + (1 - a) * low),
    ]
    for value, expected in pairs:
        torch.testing.assert_close(value, expected, rtol=4e-3, atol=4e-3)
        assert low - 1e-9 <= value <= high + 1e-9


@given(seed=st.integers(0, 2**31), rho=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_no_law_within_the_tv_ball_is_worse(seed, rho):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(6, generator=generator, dtype=F64)
    worst = tv_worst_case(atoms, rho)
    other = torch.rand(500, 6, generator=generator, dtype=F64) ** 8
    other = other / other.sum(-1, keepdim=True)
    uniform = torch.full((6,), 1 / 6, dtype=F64)
    distance = (other - uniform).abs().sum(-1, keepdim=True) / 2
    inside = uniform + (other - uniform) * (rho / distance).clamp(max=1.0)  # on the ball's surface, or in it
    assert (inside @ atoms >= worst - 1e-9).all()


def test_functionals_reduce_to_the_mean_and_to_the_extremes():
    atoms = torch.randn(4, 7, generator=torch.Generator().manual_seed(3), dtype=F64)
    for at_mean in (
        cvar(atoms, 1.0),
        upper_mean(atoms, 1.0),
        trimmed_mean(atoms, 0.0, 0.0),
        wang(atoms, 0.0),
        tv_worst_case(atoms, 0.0),
    ):
        close(at_mean, atoms.mean(-1))
    for at_minimum in (cvar(atoms, 0.0), cvar(atoms, 1e-12), tv_worst_case(atoms, 1.0), wang(atoms, 40.0)):
        close(at_minimum, atoms.amin(-1))
    for at_maximum in (upper_mean(atoms, 0.0), upper_mean(atoms, 1e-12), wang(atoms, -40.0)):
        close(at_maximum, atoms.amax(-1))
    close(trimmed_mean(atoms, 0.0, 0.7), cvar(atoms, 0.3))
    close(trimmed_mean(atoms, 0.7, 0.0), upper_mean(atoms, 0.3))
    # Every functional of a point mass is the point.
    for function, argument in itertools.product((cvar, upper_mean, tv_worst_case, wang), (0.0, 0.3, 1.0)):
        close(function(torch.full((5,), 2.5, dtype=F64), argument), 2.5)


@pytest.mark.parametrize("num_atoms", [1, 2, 10, 200])
def test_weights_are_a_distribution_and_bend_the_way_they_should(num_atoms):
    falling = [cvar_weights(num_atoms, 0.33), tv_weights(num_atoms, 0.33), wang_weights(num_atoms, 0.75)]
    rising = [upper_weights(num_atoms, 0.33), wang_weights(num_atoms, -0.75)]
    for weights in (*falling, *rising, trimmed_weights(num_atoms, 0.25, 0.1)):
        close(weights.sum(), 1.0)
        assert (weights >= 0).all()
    assert all((weights.diff() <= 1e-12).all() for weights in falling)
    assert all((weights.diff() >= -1e-12).all() for weights in rising)


@given(
    p=st.sampled_from([0.0, 0.1, 0.123, 0.25]),
    q=st.sampled_from([0.0, 0.2, 0.234, 0.35]),
    num_atoms=st.integers(10, 1000),
    share=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_noise_matched_trimming_inverts_the_noise_exactly(p, q, num_atoms, share):
    # The observed law has a share s of ones, s = v (1 - q) + (1 - v) p for the true v = (s - p) / (1 - p - q); p and
    # q need not be multiples of 1/M.
    ones = math.ceil(p * num_atoms) + round(share * math.floor((1 - q - p) * num_atoms - 1))
    observed = ones / num_atoms
    atoms = (torch.arange(num_atoms) >= num_atoms - ones).to(F64)
    true = (observed - p) / (1 - p - q)
    close(torch.tensor(true * (1 - q) + (1 - true) * p, dtype=F64), observed)
    close(trimmed_mean(atoms, lo=q, hi=p), true)
    close(noise_corrected_value(atoms.mean(), p, q), true)


def test_trimming_the_wrong_way_round_is_rejected():
    # p = .1, q = .3, v = .5: s = .5 * .7 + .5 * .1 = .4. Right: (.4 - .1)/.6 = .5. Wrong (lo = p): (.4 - .3)/.6 = 1/6.
    atoms = (torch.arange(10) >= 6).to(F64)
    close(trimmed_mean(atoms, lo=0.3, hi=0.1), 0.5)
    close(trimmed_mean(atoms, lo=0.1, hi=0.3), 1 / 6)


def test_noise_corrected_reward_is_unbiased_and_the_value_is_clipped():
    # p = .1, q = .3: 1 -> .9/.6 = 1.5 and 0 -> -.1/.6. A true 1 is seen as 1 in .7: .7 * 1.5 - .3 / 6 = 1.
    p, q = 0.1, 0.3
    seen = noise_corrected_reward(torch.tensor([1.0, 0.0], dtype=F64), p, q)
    close(seen, [1.5, -1 / 6])
    close((1 - q) * seen[0] + q * seen[1], 1.0)
    close(p * seen[0] + (1 - p) * seen[1], 0.0)
    close(noise_corrected_value(torch.tensor([1.0, 0.0, 0.4], dtype=F64), p, q), [1.0, 0.0, 0.5])


def test_a_spectral_advantage_is_gae_on_the_spectral_value():
    generator = torch.Generator().manual_seed(4)
    quantiles_BTM = torch.randn(2, 5, 10, generator=generator, dtype=F64).sort(-1).values
    rewards_BT, mask_BT = torch.randn(2, 5, generator=generator, dtype=F64), torch.ones(2, 5)
    weights = trimmed_weights(10, 0.13, 0.21)
    advantages_BTM, _ = distributional_gae(rewards_BT, quantiles_BTM, mask_BT, 0.9, 0.8)
    scalar_BT, _ = gae(rewards_BT, spectral_value(quantiles_BTM, weights), mask_BT, 0.9, 0.8)
    torch.testing.assert_close(advantages_BTM @ weights, scalar_BT)


def test_functionals_are_differentiable():
    atoms = torch.tensor([3.0, 1.0, 2.0], dtype=F64, requires_grad=True)
    cvar(atoms, 0.5).backward()
    close(atoms.grad, [0.0, 2 / 3, 1 / 3])


# Rank advantage


@DTYPES
@pytest.mark.parametrize("case", GOLDEN["rank_advantage"])
def test_golden_rank_advantages(case, dtype):
    targets, atoms = (torch.tensor(case[name], dtype=dtype) for name in ("targets", "atoms"))
    close(rank_advantage(targets, atoms, case["width"]), case["value"], dtype)


def pairwise_rank(targets, atoms, width):
    difference = targets[..., :, None] - atoms[..., None, :]
    step = difference.sign() / 2 if width == 0 else (difference / (2 * width)).clamp(-0.5, 0.5)
    return step.mean((-2, -1))


@given(
    seed=st.integers(0, 2**31),
    num_targets=st.integers(1, 9),
    num_atoms=st.integers(1, 9),
    width=st.sampled_from([0.0, 0.01, 0.5, 2.0, 100.0]),
    grid=st.sampled_from([0, 2]),
)
@settings(max_examples=60, deadline=None)
def test_rank_equals_the_pairwise_form_with_ties_and_without(seed, num_targets, num_atoms, width, grid):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(3, num_targets, generator=generator, dtype=F64)
    atoms = torch.randn(3, num_atoms, generator=generator, dtype=F64)
    if grid:  # halves and integers: ties, and pairs exactly at the clamp
        targets, atoms = (targets * grid).round() / grid, (atoms * grid).round() / grid
    close(rank_advantage(targets, atoms, width), pairwise_rank(targets, atoms, width))


@pytest.mark.parametrize(("reward", "value"), [(1.0, 0.3), (0.0, 0.3), (1.0, 0.9)])
def test_for_a_binary_reward_and_an_exact_law_the_rank_is_half_the_advantage(reward, value):
    atoms = (torch.arange(100) >= round(100 * (1 - value))).to(F64)
    close(rank_advantage(torch.tensor([reward], dtype=F64), atoms), (reward - value) / 2)


def test_rank_is_bounded_indifferent_to_scale_and_fair():
    generator = torch.Generator().manual_seed(5)
    targets, atoms = (torch.randn(50, n, generator=generator, dtype=F64) for n in (8, 12))
    rank = rank_advantage(targets, atoms)
    assert rank.abs().max() <= 0.5
    close(rank_advantage(100 * targets - 7, 100 * atoms - 7), rank)
    close(rank_advantage(atoms, targets), -rank)
    close(rank_advantage(atoms, atoms), torch.zeros(50))
    # One wild target moves it by at most 1/L of its range.
    wild = targets.clone()
    wild[:, 0] = 1e12
    assert ((rank_advantage(wild, atoms) - rank).abs() <= 1 / 8 + 1e-12).all()


def test_the_width_joins_the_rank_to_the_mean_advantage():
    generator = torch.Generator().manual_seed(6)
    targets, atoms = (torch.randn(20, n, generator=generator, dtype=F64) for n in (8, 12))
    close(rank_advantage(targets, atoms, 1e-9), rank_advantage(targets, atoms))
    wide = rank_advantage(targets, atoms, 1e3) * 2e3
    torch.testing.assert_close(wide, targets.mean(-1) - atoms.mean(-1))
    mean_advantage = rank_advantage(targets, atoms, math.inf)
    assert torch.equal(mean_advantage, torch.zeros(20, dtype=F64))


def test_smooth_rank_keeps_its_digits_in_float32_under_an_offset_and_a_distant_atom():
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(-512, 512, (4, 30), generator=generator) / 512.0
    atoms = torch.randint(-512, 512, (4, 200), generator=generator) / 512.0
    atoms[:, 0] = -1e6  # among prefix sums of 1e6, float32 has no digits for 1/512
    offset = 1e4
    expected = pairwise_rank(targets.double(), atoms.double(), 0.25)
    torch.testing.assert_close(rank_advantage(targets, atoms, 0.25).double(), expected, rtol=0, atol=1e-6)
    shifted = rank_advantage(targets + offset, atoms[:, 1:] + offset, 0.25)
    expected = pairwise_rank(targets.double(), atoms[:, 1:].double(), 0.25)
    torch.testing.assert_close(shifted.double(), expected, rtol=0, atol=1e-6)


def test_rank_carries_no_gradient_and_is_float32_for_bf16():
    targets = torch.randn(3, 4, requires_grad=True)
    assert not rank_advantage(targets, targets, 0.1).requires_grad
    assert rank_advantage(targets.bfloat16(), targets.bfloat16()).dtype == torch.float32


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cvar(x, -0.1), "alpha"),
        (lambda x: cvar(x, 1.1), "alpha"),
        (lambda x: cvar(x, math.nan), "alpha"),
        (lambda x: upper_mean(x, 1.1), "beta"),
        (lambda x: tv_worst_case(x, -1e-3), "rho"),
        (lambda x: trimmed_mean(x, 0.5, 0.5), "lo and hi"),
        (lambda x: trimmed_mean(x, -0.1, 0.5), "lo and hi"),
        (lambda x: wang(x, math.inf), "eta"),
        (lambda x: spectral_value(x, torch.ones(2)), "weights"),
        (lambda x: rank_advantage(x, x, -1.0), "width"),
        (lambda x: rank_advantage(x[None], x), "targets"),
        (lambda x: noise_corrected_value(x, 0.5, 0.5), "p and q"),
        (lambda x: noise_corrected_reward(x, -0.1, 0.5), "p and q"),
        (lambda x: critic_terms(x, x, x, 0.1, 2.0, 0.1, 0.1), "predictions"),
        (lambda x: critic_terms(x[None], x[None], x, 0.1, 2.0, 0.1, 0.1), "predictions"),
        (lambda x: critic_terms(x[None], x, x, 0.1, 2.0, 1.5, 0.1), "alpha"),
        (lambda x: critic_terms(x[None], x, x, 0.1, 2.0, 0.1, -0.5), "beta"),
        (lambda x: critic_terms(x[None], x, x, 0.1, math.inf, 0.1, 0.1), "eta"),
        (lambda x: critic_terms(x[None], x, x, -0.1, 2.0, 0.1, 0.1), "kappa"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([0.1, 0.5, 0.9]))
