import itertools
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from closeness import DTYPES, F64, close
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.core import backends, risk
from dvpo.core.returns import distributional_gae, gae
from dvpo.core.risk import (
    cvar,
    cvar_weights,
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


def test_a_noise_corrected_value_stays_a_probability():
    # p = .1, q = .3: 1 -> .9/.6 = 1.5 and 0 -> -.1/.6, both outside.
    close(noise_corrected_value(torch.tensor([1.0, 0.0, 0.4], dtype=F64), 0.1, 0.3), [1.0, 0.0, 0.5])


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
    num_targets=st.integers(1, 40),
    num_atoms=st.integers(1, 40),
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
    expected = pairwise_rank(targets, atoms, width)
    close(rank_advantage(targets, atoms, width), expected)
    with mock.patch("dvpo.core.risk.backend", return_value="torch"):
        close(rank_advantage(targets, atoms, width), expected)


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


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_a_rank_of_or_among_nan_is_nan_in_its_own_row_alone(width):
    generator = torch.Generator().manual_seed(8)
    targets, atoms = (torch.randn(3, n, generator=generator) for n in (8, 12))
    expected = rank_advantage(targets, atoms, width)
    targets[0, 3] = atoms[2, 5] = expected[0] = expected[2] = math.nan
    torch.testing.assert_close(rank_advantage(targets, atoms, width), expected, equal_nan=True)


def test_the_width_joins_the_rank_to_the_mean_advantage():
    generator = torch.Generator().manual_seed(6)
    targets, atoms = (torch.randn(20, n, generator=generator, dtype=F64) for n in (8, 12))
    close(rank_advantage(targets, atoms, 1e-9), rank_advantage(targets, atoms))
    wide = rank_advantage(targets, atoms, 1e3) * 2e3
    torch.testing.assert_close(wide, targets.mean(-1) - atoms.mean(-1))
    mean_advantage = rank_advantage(targets, atoms, math.inf)
    assert torch.equal(mean_advantage, torch.zeros(20, dtype=F64))


@pytest.mark.parametrize("where", ["compiled", "torch"])
@pytest.mark.parametrize(("width", "floor"), [(0.0, 0.0), (0.0, 0.25), (0.3, 0.0)])
def test_rows_in_parts_rank_as_they_do_together(where: str, width: float, floor: float, monkeypatch):
    """Parts of one and of two rows, the last one smaller; sorted in parts as well."""
    targets, atoms = torch.randn(5, 3, 6), torch.randn(5, 3, 4)
    atoms[2, 1, 0] = torch.nan
    monkeypatch.setattr(backends, "backend", lambda tensor: where)
    monkeypatch.setattr(risk, "backend", lambda tensor: where)
    together = risk.rank_advantage(targets, atoms, width, floor)
    assert together.shape == (5, 3)
    assert together.isnan().sum() == 1
    ordered = backends.ascending(targets)
    for chunk in (1, 12):
        monkeypatch.setattr(backends, "CHUNK", chunk)
        torch.testing.assert_close(
            risk.rank_advantage(targets, atoms, width, floor), together, rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(backends.ascending(targets), ordered, rtol=0, atol=0)


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


def test_a_floor_makes_all_returns_of_the_lower_tail_alike_and_leaves_the_others():
    atoms = torch.tensor([4.0, 1.0, 3.0, 2.0])
    targets = torch.tensor([[-1e9], [1.0], [3.0], [3.5], [10.0]])
    laws = atoms.expand(5, 4)
    # Atom number floor(.5 * 4) = 2, counted from 0, is 3: it beats two and ties with itself, (2 + 1/2)/4 - 1/2 = 1/8.
    expected = torch.tensor([1 / 8, 1 / 8, 1 / 8, 1 / 4, 1 / 2])
    torch.testing.assert_close(rank_advantage(targets, laws, floor=0.5), expected)
    # Without one, -1e9 beats none, 1 ties with the lowest: (0 + 1/2)/4 - 1/2.
    torch.testing.assert_close(rank_advantage(targets, laws)[:2], torch.tensor([-1 / 2, -3 / 8]))
    # Atom by atom of the target: one below and one above the floor.
    mixed = rank_advantage(torch.tensor([-1e9, 10.0]), atoms, floor=0.5)
    torch.testing.assert_close(mixed, torch.tensor((1 / 8 + 1 / 2) / 2))
    # The ramp of width 1 from 3: mean of clamp((3 - theta)/2, -1/2, 1/2) over 1, 2, 3, 4 = (1/2 + 1/2 + 0 - 1/2)/4.
    torch.testing.assert_close(rank_advantage(targets[:1], laws[:1], width=1.0, floor=0.5), torch.tensor([1 / 8]))


@pytest.mark.parametrize("floor", [0.1, 0.3, 0.5])
def test_under_an_exact_law_the_mean_of_a_floored_rank_is_half_the_floors_square(floor):
    atoms = torch.arange(1000.0)
    advantages = rank_advantage(atoms.unsqueeze(-1), atoms.expand(1000, 1000), floor=floor)
    assert advantages.mean().item() == pytest.approx(floor**2 / 2, abs=1e-3)


@pytest.mark.parametrize("floor", [-0.1, 1.0, math.nan])
def test_a_floor_outside_its_range_is_refused(floor):
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\)"):
        rank_advantage(torch.zeros(1), torch.zeros(1), floor=floor)


def test_rank_carries_no_gradient_and_is_float32_for_bf16():
    targets = torch.randn(3, 4, requires_grad=True)
    assert not rank_advantage(targets, targets, 0.1).requires_grad
    low = targets.detach().bfloat16()
    torch.testing.assert_close(
        rank_advantage(low, low, 0.1), rank_advantage(low.float(), low.float(), 0.1), rtol=0, atol=0
    )


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
        (lambda x: noise_corrected_value(x, -0.1, 0.5), "p and q"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([0.1, 0.5, 0.9]))
