import math

import pytest
import torch
from naive import naive_quantile_huber_by_level
from torch import Tensor

from dvpo.core import sorted_huber
from dvpo.core.quantiles import quantile_huber_by_level, quantile_levels
from dvpo.core.sorted_huber import count_below, huber_sums, sorted_atoms

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(8, 50, generator=GENERATOR)
ROWS = {
    "spread": NORMAL,
    "equal": torch.full((8, 50), 0.3),
    "two values": (NORMAL > 0).float(),
    "one far away": torch.cat([NORMAL[:, :-1], torch.full((8, 1), 1e30)], dim=1),
    "closer than float32 resolves the buckets": NORMAL * 1e-44,
    "one": NORMAL[:, :1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_counts_are_those_of_searchsorted_with_ties_outliers_and_infinities(rows: Tensor, dtype: torch.dtype):
    rows = rows.to(dtype).sort(-1).values
    beyond = torch.tensor([-math.inf, -1e30, 1e30, math.inf], dtype=dtype).expand(8, 4)
    nearby = torch.cat([rows.nextafter(beyond[:, :1]), rows, rows.nextafter(beyond[:, 3:])], dim=1)
    queries = torch.cat([nearby, torch.randn(8, 99, generator=GENERATOR).to(dtype), beyond], dim=1)
    assert torch.equal(count_below(rows, queries), torch.searchsorted(rows, queries, out_int32=True))


def test_a_nan_among_the_entries_stays_inside_its_row():
    rows = NORMAL.sort(-1).values
    expected = count_below(rows, NORMAL)
    spoilt = rows.clone()
    spoilt[3, -2:] = math.nan
    counts = count_below(spoilt, NORMAL)
    clean = torch.arange(8) != 3
    assert torch.equal(counts[clean], expected[clean])
    assert ((counts >= 0) & (counts <= 50)).all()


def test_sorting_leaves_its_input_alone_and_puts_nan_last():
    atoms = torch.tensor([[2.0, math.nan, -1.0, 0.0]]).expand(2, 4)
    before = atoms.clone()
    torch.testing.assert_close(sorted_atoms(atoms), before.sort(-1).values, equal_nan=True)
    torch.testing.assert_close(atoms, before, equal_nan=True)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 3.0])
def test_the_closed_form_of_a_point_mass_equals_the_sorted_form(kappa: float, monkeypatch: pytest.MonkeyPatch):
    # lam = 1: L equal targets. theta on and around the target and theta +- kappa.
    theta = torch.linspace(-4, 4, 2 * 3 * 33, dtype=torch.float64).view(2, 3, 33)
    atoms, levels = torch.zeros(2, 7, dtype=torch.float64), quantile_levels(33, dtype=torch.float64)
    closed = huber_sums(theta, atoms, levels, kappa)
    monkeypatch.setattr(sorted_huber, "_is_point_mass", lambda atoms_CL: False)
    torch.testing.assert_close(closed, huber_sums(theta, atoms, levels, kappa), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed, huber_sums(theta, atoms[:, :1], levels, kappa), rtol=1e-12, atol=1e-12)


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
