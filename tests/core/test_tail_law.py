"""Tail terms whose rest is the law of the return, though all they ever see is one return at a time."""

import pytest
import torch
from torch import Tensor

from dvpo.core.quantiles import quantile_huber_loss, quantile_levels
from dvpo.core.risk import critic_terms
from dvpo.core.tail_law import law_tail_terms

F64 = torch.float64
TERMS = ("cvar", "gain", "shift", "shape")


def test_the_terms_by_hand():
    # theta = (0, 2, 4, 10), alpha = .5, beta = .25, one return G = 1.
    #   low   atoms 0, 2: mean 1, var 1; a = 1/2; q = (2 + 4)/2 = 3; c = 1
    #         Z = 3 + (1 - 3)/.5 = -1                           cvar  (1 + 1)^2 = 4
    #         W = (3-1)^2 + ((1-1)^2 - (3-1)^2)/.5 = -4         (1 + 4)^2 = 25
    #   up    atom 10; q = (4 + 10)/2 = 7; G below it: Z = 7    gain  (10 - 7)^2 = 9
    #         c = 10: W = (7 - 10)^2 = 9, var of one atom 0     (0 - 9)^2 = 81
    #   shift (4 - 1)^2 = 9
    theta = torch.tensor([[4.0, 0.0, 10.0, 2.0]], dtype=F64)
    terms = law_tail_terms(theta, torch.tensor([1.0], dtype=F64), 0.5, 0.25)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {"cvar": 4, "gain": 9, "shift": 9, "shape": 25 + 81}
    )


def test_where_all_of_the_law_is_its_tail_no_return_is_cut_at_its_end():
    # theta = (0, 1), alpha = beta = 1, G = 4: q is G itself, Z = 4, (.5 - 4)^2 = 12.25. At q = 1 it would be .25.
    # c = .5: W = (4 - .5)^2 = 12.25, var .25, 12^2 = 144. From above q is 0 and G beyond it, with the same Z and W.
    terms = law_tail_terms(torch.tensor([[0.0, 1.0]]), torch.tensor([4.0]), 1.0, 1.0)
    expected = {"cvar": 12.25, "gain": 12.25, "shift": 12.25, "shape": 2 * 144}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.25, 0.5), (1.0, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize("name", TERMS)
def test_returns_drawn_from_the_predicted_law_move_nothing_on_average(name: str, alpha: float, beta: float):
    theta = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=F64).exp().sort().values
    predictions = theta.expand(20, 1, 20).clone().requires_grad_()
    law_tail_terms(predictions, theta.unsqueeze(-1), alpha, beta)[name].sum().backward()
    assert predictions.grad.abs().max() > 1e-3 or (name == "shape" and alpha == 0)  # a single return does move it
    torch.testing.assert_close(predictions.grad.sum(0), torch.zeros(1, 20, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_against_one_sampled_return_the_same_law_is_not_at_rest(name: str):
    theta = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=F64).exp().sort().values
    predictions = theta.expand(20, 1, 20).clone().requires_grad_()
    levels = quantile_levels(20, dtype=F64)
    critic_terms(predictions, theta.unsqueeze(-1), levels, 0.1, 2.0, 0.25, 0.25)[name].sum().backward()
    assert predictions.grad.sum(0).abs().max() > 0.1


def test_an_error_of_the_bound_costs_its_square_only():
    # 2,000 atoms of a normal law; the bound moved by e: the lower tail's mean is off by about density * e^2 / (2 a).
    size = 2000
    theta = torch.special.ndtri(quantile_levels(size, dtype=F64))

    def off(move: float) -> float:
        """How far E[Z] falls below the tail's mean when its bound is moved up, the law of the returns as it was."""
        moved = torch.cat([theta[:200], theta[200:].clamp(min=float(theta[199]) + 2 * move)])
        predictions = moved.expand(size, 1, size).clone().requires_grad_()
        law_tail_terms(predictions, theta.unsqueeze(-1), 0.1, 0.1)["cvar"].sum().backward()
        return float(predictions.grad.sum(0)[0, :200].sum()) / (2 * size)

    assert off(0.0) == pytest.approx(0, abs=1e-5)
    assert off(0.2) == pytest.approx(0.2**2 * 0.1755 / (2 * 0.1), rel=0.15)  # normal density at the 10% quantile
    assert off(0.1) / off(0.2) == pytest.approx(1 / 4, rel=0.2)


def rest(weights: dict[str, float], tail_targets: str) -> Tensor:
    """Where 3 heads of 32 quantiles come to rest on returns that are 1 with probability .3, one seen at a time."""
    levels = quantile_levels(32)
    theta = levels.expand(1, 3, 32).clone().requires_grad_()
    chance, returns = torch.tensor([0.7, 0.3]), torch.tensor([[0.0], [1.0]])
    optimiser = torch.optim.Adam([theta], lr=0.02)
    steps = 500
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimiser.zero_grad()
        both = theta.expand(2, -1, -1)
        if tail_targets == "law":
            terms = law_tail_terms(both, returns, 0.1, 0.1)
        else:
            terms = critic_terms(both, returns, levels, 0.1, 2.0, 0.1, 0.1)
        loss = quantile_huber_loss(both, returns, levels, 0.1) + sum(w * terms[n] for n, w in weights.items())
        (chance * loss).sum().backward()
        optimiser.step()
    return theta.detach().mean((0, 1)).sort().values


@pytest.mark.parametrize(
    ("names", "biased"),
    [((), 0.31), (("cvar",), 0.42), (("gain",), 0.12), (("shift",), 1.0), (TERMS, 0.34)],
)
def test_on_bernoulli_returns_the_law_keeps_mean_and_tails_where_the_sample_does_not(names, biased: float):
    weights = dict.fromkeys(names, 1.0)
    law, sample = rest(weights, "law"), rest(weights, "sample")
    assert float(law.mean()) == pytest.approx(0.31, abs=0.02)
    assert float(law[:4].mean()) == pytest.approx(0, abs=0.05)
    assert float(law[-4:].mean()) == pytest.approx(1, abs=0.05)
    assert float(sample.mean()) == pytest.approx(biased, abs=0.02)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_equal_finite_differences_of_the_term_with_its_targets_held(name: str):
    generator = torch.Generator().manual_seed(13)
    predictions = torch.randn(2, 3, 9, generator=generator, dtype=F64).requires_grad_()
    targets = torch.randn(2, 8, generator=generator, dtype=F64) ** 3
    (gradient,) = torch.autograd.grad(law_tail_terms(predictions, targets, 0.3, 0.4)[name].sum(), predictions)

    at = predictions.detach().mean(-2).sort(-1).values

    def held(theta: Tensor) -> Tensor:
        """The square of tail statistic less target, the targets taken at `predictions`."""
        now = theta.mean(-2).sort(-1).values
        if name == "shift":
            return (now.mean(-1) - targets.mean(-1)).square().sum()
        total = theta.new_zeros(())
        for sign, count in ((1, 3), (-1, 4)):
            law, seen = (x if sign == 1 else -x.flip(-1) for x in (at, now))
            bound, centre = (law[:, count - 1] + law[:, count]) / 2, law[:, :count].mean(-1)
            below = (sign * targets).minimum(bound[:, None])
            if name == "shape":
                centred = (below - centre[:, None]).square() * (sign * targets < bound[:, None]) + (
                    (bound - centre).square()[:, None] * (sign * targets >= bound[:, None])
                )
                edge = (bound - centre).square()
                target = edge + (centred.mean(-1) - edge) * 9 / count
                total = total + (seen[:, :count].var(-1, correction=0) - target).square().sum()
            elif sign == (1 if name == "cvar" else -1):
                target = bound + (below.mean(-1) - bound) * 9 / count
                total = total + (seen[:, :count].mean(-1) - target).square().sum()
        return total

    assert torch.autograd.gradcheck(held, (predictions,), eps=1e-7, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(held(predictions), predictions)[0])


def test_each_token_by_itself_and_far_from_0_in_float32():
    generator = torch.Generator().manual_seed(2)
    predictions = torch.randint(-512, 512, (5, 3, 20), generator=generator) / 512.0
    targets = torch.randint(-512, 512, (5, 20), generator=generator) / 512.0
    exact = law_tail_terms(predictions.double(), targets.double(), 0.2, 0.2)
    for name, value in law_tail_terms(predictions + 1e4, targets + 1e4, 0.2, 0.2).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)
        alone = torch.stack([law_tail_terms(predictions[k], targets[k], 0.2, 0.2)[name] for k in range(5)])
        torch.testing.assert_close(alone.double(), exact[name], rtol=1e-4, atol=1e-5)


def test_an_outlier_above_leaves_the_lower_tail_its_digits_in_float32():
    # The mean of the 20 returns is 5e7 then, where float32 knows multiples of 4.
    generator = torch.Generator().manual_seed(3)
    predictions, targets = torch.rand(5, 3, 20, generator=generator), torch.rand(5, 20, generator=generator)
    targets[:, 7] = 1e9
    exact = law_tail_terms(predictions.double(), targets.double(), 0.2, 0.2)
    for name, value in law_tail_terms(predictions, targets, 0.2, 0.2).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: law_tail_terms(x, x, 0.1, 0.1), "predictions"),
        (lambda x: law_tail_terms(x[None], x, 1.5, 0.1), "alpha"),
        (lambda x: law_tail_terms(x[None], x, 0.1, -0.1), "beta"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([0.1, 0.5, 0.9]))
