import pytest
import torch
from torch.nn import functional as F

from dvpo.core import compiled_rows
from dvpo.core.monotone import monotone_quantiles

GENERATOR = torch.Generator().manual_seed(0)


def written_out(raw: torch.Tensor) -> torch.Tensor:
    steps = F.softplus(raw[..., 1:]).cumsum(-1) / (raw.shape[-1] - 1)
    return raw[..., :1] + steps - steps.mean(-1, keepdim=True)


def test_worked_example():
    # softplus(0) = log 2, softplus(log 3) = log 4: c = log 2, log 8; mean log 4; (c - mean) / 2 = -log(2)/2, log(2)/2.
    log2 = torch.tensor(2.0).log()
    quantiles = monotone_quantiles(torch.tensor([5.0, 0.0, torch.tensor(3.0).log()]))
    torch.testing.assert_close(quantiles, torch.stack([5 - log2 / 2, 5 + log2 / 2]))


@pytest.mark.parametrize("size", [1, 2, 33, 200])
def test_values_and_gradients_equal_the_formula_and_autograd_in_float64(size: int):
    raw = 5 * torch.randn(4, 3, 1 + size, generator=GENERATOR)
    weights = torch.randn(4, 3, size, generator=GENERATOR)
    ours, exact = raw.clone().requires_grad_(), raw.double().requires_grad_()
    quantiles, expected = monotone_quantiles(ours), written_out(exact)
    (quantiles * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(quantiles.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert (quantiles.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(quantiles.mean(-1), raw[..., 0], rtol=1e-5, atol=1e-6)


def test_far_from_0_it_is_the_line_and_the_exponential_and_never_nan():
    x = torch.tensor([-200.0, -80.0, -10.0, 0.0, 10.0, 80.0, 200.0, 1e30])
    raw = torch.stack([torch.zeros(8), x], dim=1).requires_grad_()
    steps = torch.cat(
        [raw, raw[:, 1:]], dim=1
    )  # two equal increments: the gap between the quantiles is softplus(x) / 2
    gaps = 2 * monotone_quantiles(steps).diff(dim=-1)[:, 0]
    torch.testing.assert_close(gaps, F.softplus(x), rtol=3e-6, atol=1e-30)
    gaps.sum().backward()
    torch.testing.assert_close(raw.grad[:, 1], torch.sigmoid(x), rtol=1e-6, atol=1e-30)


def test_a_nan_stays_in_its_row():
    raw = torch.randn(3, 5, generator=GENERATOR)
    raw[1, 2] = float("nan")
    assert monotone_quantiles(raw).isnan().all(dim=-1).tolist() == [False, True, False]
    assert compiled_rows.monotone_backward(raw, torch.ones(3, 4)).isnan().any(dim=-1).tolist() == [False, True, False]
