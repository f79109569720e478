"""The forms of the critic's loss are one function: torch's, the compiled one, the pairwise definition."""

import math

import pytest
import torch
from naive import naive_quantile_huber_by_level
from torch import Tensor

from dvpo.core import compiled_loss, sorted_huber
from dvpo.core.quantiles import quantile_huber_by_level, quantile_levels
from largest_tensor import LargestTensor

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(8, 50, generator=GENERATOR)
ATOMS = {
    "spread": NORMAL,
    "equal": torch.full((8, 50), 0.3),
    "two values": (NORMAL > 0).float(),
    "one far away": torch.cat([NORMAL[:, :-1], torch.full((8, 1), 1e3)], dim=1),
    "very close": NORMAL * 1e-30,
    "one": NORMAL[:, :1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("atoms", ATOMS.values(), ids=ATOMS)
def test_the_forms_agree_on_and_beside_the_atoms(atoms: Tensor, kappa: float, dtype: torch.dtype):
    # Predictions on every atom, on every atom +- kappa, next to them, and anywhere; 3 heads, unsorted and sorted.
    atoms = atoms.to(dtype)
    on = torch.cat([atoms - kappa, atoms, atoms + kappa], dim=1)
    beside = on.nextafter(torch.full_like(on, math.inf))
    anywhere = torch.randn(8, 2 * on.shape[1], generator=GENERATOR, dtype=dtype)
    theta = torch.stack([torch.cat([on, beside], dim=1), anywhere, anywhere.sort(-1).values], dim=1)
    levels = quantile_levels(theta.shape[-1])
    for given in (theta, theta.sort(-1).values):
        ours = compiled_loss.huber_sums(given, atoms, levels, kappa)
        theirs = sorted_huber.huber_sums(given, atoms.sort(-1).values, levels, kappa)
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=3e-6)


def test_predictions_that_are_sorted_and_that_are_not_give_the_same_token_by_token():
    theta, levels = torch.randn(8, 3, 40, generator=GENERATOR), quantile_levels(40)
    ascending = theta.sort(-1)
    losses, slopes = compiled_loss.huber_sums(ascending.values, NORMAL, levels, 0.1)
    mixed = torch.cat([ascending.values, theta])  # one unsorted row, and no row is taken for sorted
    losses_too, slopes_too = compiled_loss.huber_sums(mixed, NORMAL.repeat(2, 1), levels, 0.1)
    assert torch.equal(losses_too[:8], losses)
    assert torch.equal(slopes_too[:8], slopes)


def test_threads_share_the_tokens_out_and_change_no_bit():
    theta, atoms = torch.randn(300, 2, 9, generator=GENERATOR), torch.randn(300, 11, generator=GENERATOR)
    alone = compiled_loss.huber_sums(theta, atoms, quantile_levels(9), 0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = compiled_loss.huber_sums(theta, atoms, quantile_levels(9), 0.1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_inputs_are_left_alone():
    theta, atoms = torch.randn(8, 3, 40, generator=GENERATOR), NORMAL.clone()
    before = theta.clone()
    compiled_loss.huber_sums(theta, atoms, quantile_levels(40), 0.1)
    assert torch.equal(theta, before)
    assert torch.equal(atoms, NORMAL)


def test_the_torch_form_works_on_chunks_of_tokens_which_change_nothing(monkeypatch: pytest.MonkeyPatch):
    theta, atoms = torch.randn(7, 2, 4, generator=GENERATOR), torch.randn(7, 6, generator=GENERATOR).sort(-1).values
    at_once = sorted_huber.huber_sums(theta, atoms, quantile_levels(4), 0.1)
    monkeypatch.setattr(sorted_huber, "_CHUNK", 3 * 2 * 4)
    with LargestTensor() as largest:
        in_chunks = sorted_huber.huber_sums(theta, atoms, quantile_levels(4), 0.1)
    assert largest.entries == 3 * 3 * 2 * 4  # three edges of three tokens
    assert all(torch.equal(a, b) for a, b in zip(at_once, in_chunks, strict=True))


@pytest.mark.parametrize("far", [1e4, 1e7, 1e9])
@pytest.mark.parametrize("outliers", ["one atom", "most atoms", "atom and prediction", "half of both"])
def test_an_outlier_does_not_round_the_others_away(outliers: str, far: float):
    # Atoms and predictions between .2 and .8, kappa .1; less the atoms' mean, far / 32, all would be one number in
    # float32 from 1e7 on. Sums lose 3e-14 far / kappa of the loss, a hundredth of it in the gradient.
    atoms, theta = (0.2 + 0.6 * torch.rand(*shape, generator=GENERATOR) for shape in ((64, 32), (64, 3, 32)))
    atoms = atoms.sort(-1).values
    if outliers == "most atoms":
        atoms[:, 4:] = far
    elif outliers == "half of both":
        atoms[:, 16:] += far
        theta[:, :, 16:] += far
    else:
        atoms[:, -1] = far
    if outliers == "atom and prediction":
        theta[:, :, -1] = far
    levels = quantile_levels(32)
    exact_theta = theta.double().requires_grad_()
    exact = naive_quantile_huber_by_level(exact_theta, atoms.double(), levels.double(), 0.1)
    exact.sum().backward()
    for form in (compiled_loss, sorted_huber):
        losses, slopes = form.huber_sums(theta, atoms, levels, 0.1)
        torch.testing.assert_close(losses.double(), exact.detach(), rtol=3e-7 + 3e-13 * far, atol=0)
        torch.testing.assert_close(slopes.double(), exact_theta.grad, rtol=0, atol=3e-7 + 3e-15 * far)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_float32_sums_would_lose_the_digits_that_ours_keep(offset: float):
    # The error against float64 on the same inputs, and that of the pairwise float32 form: ours is no worse. Prefix sums
    # in float32, not centred, are off by 3e-3 at an offset of 10 and by .7 at 100.
    theta = torch.randn(64, 3, 100, generator=GENERATOR) + offset
    atoms, levels = torch.randn(64, 100, generator=GENERATOR) + offset, quantile_levels(100)
    exact = naive_quantile_huber_by_level(theta.double(), atoms.double(), levels.double(), 0.1)

    def error(losses: Tensor) -> float:
        return ((losses - exact) / exact).abs().max().item()

    ours = error(quantile_huber_by_level(theta, atoms, levels, 0.1))
    assert ours < 1.2e-7
    assert ours <= error(naive_quantile_huber_by_level(theta, atoms, levels, 0.1))
