import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from closeness import DTYPES, F64, close
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_critic_terms
from torch import Tensor

from dvpo.core.quantiles import quantile_levels
from dvpo.core.risk import critic_terms
from largest_tensor import LargestTensor

pytestmark = pytest.mark.usefixtures("form")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["critic_terms"]
TERMS = ["qr", "risk", "cvar", "gain", "shift", "shape", "curvature", "consistency"]


@DTYPES
@pytest.mark.parametrize("case", GOLDEN)
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


@pytest.mark.parametrize(("offset", "outlier"), [(0.0, 1e7), (0.0, 1e9), (1e4, None)])
def test_terms_keep_their_digits_in_float32_beside_an_outlier_and_ranks_at_an_offset(form, offset, outlier):
    # Unsorted heads: float32 means at 1e4 are multiples of .001, on which 40 levels within .6 tie or change places. The
    # mean of 20 atoms is outlier / 20, near which float32 knows multiples of 1/32 (1e7) or of 4 (1e9).
    generator = torch.Generator().manual_seed(3)
    predictions = 0.6 * torch.rand(64, 3, 40, generator=generator) + offset
    targets = 0.6 * torch.rand(64, 20, generator=generator) + offset
    if outlier:
        targets[:, 7] = outlier
    arguments = (quantile_levels(40), 0.1, 2.0, 0.2, 0.2)
    exact = naive_critic_terms(predictions.double(), targets.double(), arguments[0].double(), *arguments[1:])
    for name, value in critic_terms(predictions, targets, *arguments).items():
        rtol = 1e-4 if name in ("qr", "risk") else 1e-5  # of an outlier the loss keeps fewer digits
        torch.testing.assert_close(value.double(), exact[name], rtol=rtol, atol=1e-7)


def test_bf16_predictions_are_computed_in_float32():
    predictions = torch.tensor([[0.1, 0.2, 0.3, 0.7], [0.0, 0.3, 0.6, 1.1]], dtype=torch.bfloat16, requires_grad=True)
    given = (torch.tensor([0.15, 0.4, 1.3]), quantile_levels(4), 0.1, 2.0, 0.1, 0.1)
    terms, exact = critic_terms(predictions, *given), critic_terms(predictions.detach().float(), *given)
    for name, value in terms.items():
        torch.testing.assert_close(value, exact[name], rtol=0, atol=0)
    sum(terms.values()).backward()
    assert predictions.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
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


# Fused: one pass for all terms


def random_tokens(dtype=torch.float32, offset=0.0, atoms=60):
    generator = torch.Generator().manual_seed(5)
    predictions = torch.randn(40, 3, 50, generator=generator, dtype=dtype) + offset
    targets = torch.randn(40, atoms, generator=generator, dtype=dtype) + offset
    return predictions, targets, quantile_levels(50, dtype=dtype), 0.1, 2.0, 0.1, 0.2


WEIGHTS = dict(zip(TERMS, (1.0, 0.5, 0.3, 0.2, 0.7, 0.1, 0.4, 0.6), strict=True))


def loss_and_gradient(terms_of, predictions, *others):
    predictions = predictions.clone().requires_grad_()
    terms = terms_of(predictions, *others)
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    order = torch.arange(1, len(loss) + 1, dtype=loss.dtype)
    (loss * order).sum().backward()
    return loss.detach(), predictions.grad


@pytest.mark.parametrize("atoms", [1, 60])
@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_the_weighted_sum_and_its_gradient_equal_broadcasting_and_autograd_in_float64(offset, atoms):
    case = random_tokens(torch.float64, offset, atoms)
    ours, naive = loss_and_gradient(critic_terms, *case), loss_and_gradient(naive_critic_terms, *case)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_float32_has_the_digits_of_float64_at_any_offset(offset):
    case = random_tokens(torch.float32, offset)
    wide = [x.double() if isinstance(x, Tensor) else x for x in case]
    loss, gradient = loss_and_gradient(critic_terms, *case)
    exact_loss, exact_gradient = loss_and_gradient(naive_critic_terms, *wide)
    assert ((loss - exact_loss) / exact_loss).abs().max() < 1e-6
    assert (gradient - exact_gradient).abs().max() < 2e-6 * exact_gradient.abs().max()


def test_a_term_left_out_of_the_loss_gets_no_gradient_work_and_changes_none():
    predictions, *others = random_tokens(torch.float64)
    for name in TERMS:
        theta = predictions.clone().requires_grad_()
        terms = critic_terms(theta, *others)
        (alone,) = torch.autograd.grad(terms[name].sum(), theta, retain_graph=True)
        total = sum((1.0 if other == name else 0.0) * term.sum() for other, term in terms.items())
        (with_zeros,) = torch.autograd.grad(total, theta)
        close(alone, with_zeros)


def test_no_tensor_is_larger_than_the_three_edges_of_each_prediction(form):
    predictions, *others = random_tokens()
    predictions.requires_grad_()
    with LargestTensor() as largest:
        sum(term.sum() for term in critic_terms(predictions, *others).values()).backward()
    assert largest.entries == (3 if form == "torch" else 1) * predictions.numel()
    with LargestTensor() as largest:
        naive_critic_terms(predictions, *others)
    assert largest.entries == predictions.numel() * others[0].shape[-1]


def test_fused_terms_beat_broadcasting_by_a_wide_margin(form):
    # 200 times at 512 tokens and M = L = 200 (benchmarks/quantile_loss.py); here a bound that no busy machine breaks.
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(32, 3, 200, generator=generator).requires_grad_()
    case = (predictions, torch.randn(32, 200, generator=generator), quantile_levels(200), 0.1, 2.0, 0.1, 0.1)

    def cpu_seconds(terms_of):
        def run():
            start = time.thread_time()
            sum(term.sum() for term in terms_of(*case).values()).backward()
            return time.thread_time() - start

        return min(run() for _ in range(4))

    assert cpu_seconds(naive_critic_terms) > {"compiled": 12, "torch": 3}[form] * cpu_seconds(critic_terms)
