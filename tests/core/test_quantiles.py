import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_quantile_huber_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvpo.core.quantiles import (
    crossing_share,
    quantile_huber_by_level,
    quantile_huber_loss,
    quantile_levels,
)

pytestmark = pytest.mark.usefixtures("form")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["critic_terms"]


def random_case(*shape: int, atoms: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of `shape` = [..., N, M], targets and midpoint levels, seeded."""
    generator = torch.Generator().manual_seed(sum(shape) + atoms)
    predictions = torch.randn(*shape, dtype=dtype, generator=generator)
    targets = torch.randn(*shape[:-2], atoms, dtype=dtype, generator=generator)
    return predictions, targets, quantile_levels(shape[-1], dtype=dtype)


def loss_and_gradient(loss_function: Any, predictions: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum weighted 1, 2, 3, ... so that tokens cannot be mixed up."""
    predictions = predictions.clone().requires_grad_()
    losses = loss_function(predictions, *args)
    order = torch.arange(1, losses.numel() + 1, dtype=losses.dtype).view_as(losses)
    (losses * order).sum().backward()
    assert predictions.grad is not None
    return losses.detach(), predictions.grad


# Levels


def test_levels_worked_example():
    # M = 4: midpoint (1/2, 3/2, 5/2, 7/2) / 4; paper 1/4, 2/4, 3/4 and 1 - 1/8 in place of 1.
    assert quantile_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert quantile_levels(4, "paper").tolist() == [0.25, 0.5, 0.75, 0.875]
    assert quantile_levels(1).tolist() == quantile_levels(1, "paper").tolist() == [0.5]


def test_levels_are_rounded_once_to_the_asked_dtype():
    exact = [(j - 0.5) / 200 for j in range(1, 201)]
    assert quantile_levels(200, dtype=torch.float64).tolist() == exact
    assert torch.equal(quantile_levels(200), torch.tensor(exact))


def test_levels_refuse_what_is_no_grid():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        quantile_levels(0)
    with pytest.raises(ValueError, match="'midpoint' or 'paper', got 'middle'"):
        quantile_levels(3, "middle")  # type: ignore[arg-type]


# Values and gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"N{len(case['theta'])}M{len(case['tau'])}L{len(case['G'])}")
def test_golden_values_and_gradients(case, dtype, tolerance):
    theta, atoms, tau = (torch.tensor(case[name], dtype=dtype) for name in ("theta", "G", "tau"))
    torch.testing.assert_close(quantile_levels(len(tau), case["levels"], dtype=dtype), tau)
    loss, gradient = loss_and_gradient(quantile_huber_loss, theta, atoms, tau, case["kappa"])
    assert loss.item() == pytest.approx(case["terms"]["qr"], rel=tolerance)
    if "qr_gradient" in case:
        expected = torch.tensor(case["qr_gradient"], dtype=dtype)
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    weights = torch.exp(-case["eta"] * tau)
    risk = quantile_huber_loss(theta, atoms, tau, case["kappa"], weights / weights.mean())
    assert risk.item() == pytest.approx(case["terms"]["risk"], rel=tolerance)


def test_worked_example_with_one_atom_in_each_part():
    # theta = 0, kappa = 1, tau = 1/4; atoms -3, -1/2, 1/2, 2 lie far below, near below, near above, far above.
    #   H:       3 - 1/2 = 2.5,   1/8,   1/8,   2 - 1/2 = 1.5        H': 1, 1/2, 1/2, 1
    #   loss:    (3/4 * (2.5 + 0.125) + 1/4 * (0.125 + 1.5)) / 4 = (1.96875 + 0.40625) / 4 = 0.59375
    #   slope:   (3/4 * (1 + 0.5) - 1/4 * (0.5 + 1)) / 4 = (1.125 - 0.375) / 4 = 0.1875
    atoms = torch.tensor([0.5, -3.0, 2.0, -0.5])
    loss, gradient = loss_and_gradient(quantile_huber_loss, torch.zeros(1, 1), atoms, torch.tensor([0.25]), 1.0)
    assert loss.item() == 0.59375
    assert gradient.item() == 0.1875


@st.composite
def tied_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Small shapes on a grid of quarters, so that atoms repeat and tie with predictions and with theta +- kappa."""
    size = st.integers(1, 6)
    batch = draw(st.sampled_from([(), (3,), (2, 2)]))
    heads, levels, atoms = draw(size), draw(size), draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    span = draw(st.integers(1, 40))

    def grid(*shape: int) -> Tensor:
        return torch.randint(-span, span + 1, shape, generator=generator).double() / 4

    tau = torch.rand(levels, dtype=torch.float64, generator=generator)
    weights = torch.rand(levels, dtype=torch.float64, generator=generator) if draw(st.booleans()) else None
    kappa = draw(st.sampled_from([0.0, 1e-3, 0.1, 0.25, 1.0, 100.0]))
    return grid(*batch, heads, levels), grid(*batch, atoms), tau, kappa, weights


@settings(max_examples=200, deadline=None)
@given(tied_cases())
def test_equals_the_naive_form_and_its_autograd_for_any_shape_with_ties(case):
    exact = loss_and_gradient(quantile_huber_loss, *case)
    naive = loss_and_gradient(naive_quantile_huber_loss, *case)
    torch.testing.assert_close(exact, naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kappa", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("atoms", [1, 7])
def test_gradient_equals_finite_differences(kappa, atoms):
    predictions, targets, levels = random_case(2, 3, 5, atoms=atoms)
    predictions.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda theta: quantile_huber_by_level(theta, targets, levels, kappa), predictions, eps=1e-7, atol=1e-6
    )


def test_at_kappa_0_an_atom_that_ties_adds_0_to_the_gradient():
    # theta = 0 among atoms -1, 0, 0, 2, tau = 1/4: (3/4 * 1 [the atom below] - 1/4 * 1 [the atom above]) / 4 = 1/8.
    # Any number in [1/8 - 2/4 * 1/4, 1/8 + 2/4 * 3/4] would be a subgradient.
    atoms = torch.tensor([-1.0, 0.0, 0.0, 2.0])
    _, gradient = loss_and_gradient(quantile_huber_loss, torch.zeros(1, 1), atoms, torch.tensor([0.25]), 0.0)
    assert gradient.item() == 0.125


def test_a_near_tie_that_centring_would_round_away_is_no_tie():
    # The token's mean is about 5e3, where float64 cannot tell 0.1 from the next number. All three atoms are above.
    theta = torch.tensor([[0.1]], dtype=torch.float64)
    just_above = torch.nextafter(theta[0], torch.ones(1, dtype=torch.float64))
    atoms = torch.cat([just_above, just_above, torch.tensor([1e4], dtype=torch.float64)])
    _, gradient = loss_and_gradient(quantile_huber_loss, theta, atoms, torch.tensor([0.5]), 0.0)
    assert gradient.item() == -0.5


def test_one_head_one_level_and_a_wide_kappa_is_half_the_squared_error():
    # |1/2 - 1{u < 0}| = 1/2 and H = u^2 / (2 kappa): 4 kappa times the loss is mean u^2, its slope -2 mean u.
    predictions, targets, levels = random_case(5, 1, 1, atoms=9)
    kappa = 1e3
    loss, gradient = loss_and_gradient(
        lambda *args: 4 * kappa * quantile_huber_loss(*args), predictions, targets, levels, kappa
    )
    error = targets - predictions[..., 0]
    order = torch.arange(1, 6, dtype=torch.float64)
    torch.testing.assert_close(loss, error.square().mean(-1), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient[:, 0, 0], -2 * error.mean(-1) * order, rtol=1e-9, atol=0)


def test_by_level_serves_any_weights_with_one_call():
    predictions, targets, levels = random_case(4, 3, 6, atoms=8)
    weights = torch.exp(-2 * levels)

    def both(theta: Tensor, *args: Any) -> Tensor:
        by_level = quantile_huber_by_level(theta, *args)
        return by_level.mean(-1) + 3 * (by_level * weights).mean(-1)

    def naive(theta: Tensor, *args: Any) -> Tensor:
        return naive_quantile_huber_loss(theta, *args) + 3 * naive_quantile_huber_loss(theta, *args, weights)

    args = (predictions, targets, levels, 0.1)
    torch.testing.assert_close(loss_and_gradient(both, *args), loss_and_gradient(naive, *args), rtol=1e-9, atol=1e-12)


# What the loss is for


def fitted(sample: Tensor, levels: Tensor) -> Tensor:
    """Minimise the pinball loss (kappa = 0) by subgradient steps that shrink."""
    theta = torch.zeros(1, len(levels), dtype=sample.dtype)
    for step in range(2000):
        _, gradient = loss_and_gradient(quantile_huber_loss, theta, sample, levels, 0.0)
        theta -= 10 / (step + 10) * len(levels) * gradient
    return theta[0]


def test_the_minimiser_is_the_samples_quantiles_and_swapping_tau_for_1_minus_tau_is_not():
    sample = torch.rand(1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log().neg()
    levels = quantile_levels(5, dtype=torch.float64)
    quantiles_M = sample.quantile(levels)  # of an exponential law: skewed, so that a mirror image is wrong
    assert (fitted(sample, levels) - quantiles_M).abs().max() < 0.05
    assert (fitted(sample, 1 - levels) - quantiles_M).abs().max() > 1


# Cost


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_tensor(loss_function: Any, *args: Any) -> int:
    with LargestTensor() as largest:
        loss_and_gradient(loss_function, *args)
    return largest.elements


def test_no_tensor_is_larger_than_the_three_edges_of_each_prediction(form: str):
    tokens, heads, num_quantiles, atoms = 5, 3, 40, 50
    args = (*random_case(tokens, heads, num_quantiles, atoms=atoms), 0.1)
    edges = 3 if form == "torch" else 1  # compiled, a token's edges are scratch
    assert largest_tensor(quantile_huber_loss, *args) == edges * tokens * heads * num_quantiles
    assert largest_tensor(naive_quantile_huber_loss, *args) == tokens * heads * num_quantiles * atoms


# Precision


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("kappa", [0.0, 1e-4, 0.1, 1.0])
def test_float32_is_exact_to_rounding_at_any_offset(offset, kappa):
    # The float32 inputs are themselves on a grid of 1e-3 at 1e4; the reference is float64 on the same inputs.
    predictions, targets, levels = random_case(16, 3, 50, atoms=60, dtype=torch.float32)
    predictions, targets = predictions + offset, targets + offset
    loss, gradient = loss_and_gradient(quantile_huber_loss, predictions, targets, levels, kappa)
    true_loss, true_gradient = loss_and_gradient(
        naive_quantile_huber_loss, predictions.double(), targets.double(), levels.double(), kappa
    )
    torch.testing.assert_close(loss.double(), true_loss, rtol=3e-7, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=3e-7 * true_gradient.abs().max().item())


def test_bfloat16_is_upcast_and_autocast_changes_nothing():
    predictions, targets, levels = random_case(3, 2, 5, atoms=4, dtype=torch.bfloat16)
    levels = quantile_levels(5)
    loss, gradient = loss_and_gradient(quantile_huber_loss, predictions, targets, levels, 0.1)
    expected_loss, expected_gradient = loss_and_gradient(
        quantile_huber_loss, predictions.float(), targets.float(), levels, 0.1
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient, expected_gradient.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantile_huber_loss(predictions.float(), targets.float(), levels, 0.1), expected_loss)


# Edges


def test_a_nan_atom_spoils_its_own_token_only():
    predictions, targets, levels = random_case(3, 2, 4, atoms=5)
    clean = quantile_huber_loss(predictions, targets, levels, 0.1)
    targets[1, 2] = float("nan")
    spoilt = quantile_huber_loss(predictions, targets, levels, 0.1)
    assert spoilt.isnan().tolist() == [False, True, False]
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


def test_no_tokens_is_no_loss():
    predictions = torch.zeros(0, 3, 4, requires_grad=True)
    losses = quantile_huber_loss(predictions, torch.zeros(0, 5), quantile_levels(4), 0.1)
    losses.sum().backward()
    assert losses.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": torch.zeros(4)}, r"predictions must be \[\.\.\., N, M\].*predictions \(4,\)"),
        ({"targets": torch.zeros(3, 5)}, r"equal leading sizes.*targets \(3, 5\)"),
        ({"targets": torch.zeros(2, 0)}, "at least one"),
        ({"predictions": torch.zeros(2, 0, 4)}, "at least one"),
        ({"levels": torch.zeros(3)}, r"levels must be \[M\].*levels \(3,\)"),
        ({"targets": torch.zeros(2, 5, requires_grad=True)}, "targets must not require grad"),
        ({"kappa": -0.1}, "kappa must be finite and at least 0, got -0.1"),
        ({"kappa": float("inf")}, "kappa must be finite"),
        ({"kappa": float("nan")}, "kappa must be finite"),
        ({"level_weights": torch.ones(5)}, r"level_weights.*\(5,\) and \(4,\)"),
    ],
)
def test_refuses_wrong_arguments_with_their_shapes(change, message):
    right = {
        "predictions": torch.zeros(2, 3, 4),
        "targets": torch.zeros(2, 5),
        "levels": quantile_levels(4),
        "kappa": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        quantile_huber_loss(**(right | change))


# Crossings


def test_crossing_share_worked_example():
    # 1 < 2, 2 > 0 (crosses), 0 = 0 (does not): 1 of 3; sorted: 0; reversed: 3 of 3.
    quantiles_BM = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    assert crossing_share(quantiles_BM).tolist() == pytest.approx([1 / 3, 0, 1])
    assert crossing_share(torch.tensor([[3.0], [1.0]])).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        crossing_share(torch.zeros(2, 0))
