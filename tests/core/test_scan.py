import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import looped_gae

from dvpo.core import backends, returns
from dvpo.core.returns import distributional_gae, distributional_targets
from dvpo.core.scan import PolicyRows, discounted_scan_

pytestmark = pytest.mark.usefixtures("form")

F64 = torch.float64


def test_scan_worked_example():
    # x_2 = 3 + .5 * 8 = 7, x_1 = 2 + .5 * 7 = 5.5, x_0 = 1 + .5 * 5.5 = 3.75
    terms = torch.tensor([1.0, 2.0, 3.0])[None, :, None]
    assert discounted_scan_(terms, torch.tensor([[8.0]]), 0.5).flatten().tolist() == [3.75, 5.5, 7.0]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 600])
@pytest.mark.parametrize("decay", [1.0, 0.9, 1e-30, 0.0])
def test_blocks_and_blocks_of_blocks_add_up_to_the_sum(length, decay):
    generator = torch.Generator().manual_seed(length)
    terms = torch.randn(2, length, 3, dtype=F64, generator=generator)
    end = torch.randn(2, 3, dtype=F64, generator=generator)
    powers = decay ** torch.arange(length + 1, dtype=F64)
    with_end = torch.cat([terms, end[:, None]], dim=1)
    expected = torch.stack([(powers[: length + 1 - t, None] * with_end[:, t:]).sum(1) for t in range(length)], dim=1)
    torch.testing.assert_close(discounted_scan_(terms.clone(), end, decay), expected, rtol=1e-12, atol=1e-12)


def test_powers_that_underflow_make_no_nan_in_float32():
    terms = torch.ones(1, 5000, 2)
    scanned = discounted_scan_(terms, torch.ones(1, 2), 1e-20)
    assert torch.equal(scanned, torch.ones(1, 5000, 2))


def test_what_stands_before_a_position_does_not_reach_it():
    terms = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(0))
    terms[:, :123] = torch.nan
    whole = discounted_scan_(terms.clone(), torch.zeros(1, 4), 0.95)
    part = discounted_scan_(terms[:, 123:].clone(), torch.zeros(1, 4), 0.95)
    torch.testing.assert_close(whole[:, 123:], part, rtol=1e-6, atol=1e-6)


def test_rows_worked_example():
    # Tokens at 1 and 3 of five positions: S = 2, rows 0 and 1 hold them, row 2 the end; masked positions read row 3.
    # Where the last token is the end, they move to rows 1 and 2.
    keep = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]]).bool()
    rows = PolicyRows.of(keep, torch.tensor([False, True]))
    assert rows.row_BT.tolist() == [[3, 0, 3, 1, 3], [3, 1, 3, 2, 3]]
    assert rows.source_BR[0, :2].tolist() == [1, 3]
    assert rows.source_BR[1, 1:].tolist() == [1, 3]
    assert rows.is_end_B.tolist() == [False, True]


@st.composite
def batches(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_sequences, length, num_quantiles = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    mask = torch.rand(num_sequences, length, generator=generator) < draw(st.sampled_from([0.1, 0.6, 1.0]))
    rewards = torch.randn(num_sequences, length, dtype=F64, generator=generator) * mask
    quantiles = torch.randn(num_sequences, length, num_quantiles, dtype=F64, generator=generator)
    bootstrap = torch.randn(num_sequences, num_quantiles, dtype=F64, generator=generator)
    silent = torch.rand(num_sequences, generator=generator) < 0.3
    gamma, lam = (draw(st.sampled_from([0.0, 0.3, 0.95, 1.0])) for _ in range(2))
    return rewards, quantiles, mask, gamma, lam, bootstrap, silent, draw(st.sampled_from([None, 0.5]))


@settings(max_examples=100, deadline=None)
@given(batches())
def test_the_scan_equals_the_loop_with_gaps_bootstraps_missing_rewards_and_clipped_deltas(batch):
    *given_, silent, delta_clip = batch
    expected = looped_gae(*given_, silent, delta_clip)
    outputs = distributional_gae(*given_, zero_last_delta=silent, delta_clip=delta_clip)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    if delta_clip is None:
        assert torch.equal(distributional_targets(*given_, zero_last_delta=silent), outputs[1])
        in_place = distributional_targets(*given_, zero_last_delta=silent, out=given_[1])
        assert in_place is given_[1]
        assert torch.equal(in_place, outputs[1])


def test_float32_is_as_near_to_float64_as_the_loop_over_thousands_of_tokens():
    generator = torch.Generator().manual_seed(1)
    quantiles = torch.randn(2, 3000, 4, generator=generator) + 10
    rewards, mask = torch.randn(2, 3000, generator=generator), torch.ones(2, 3000, dtype=torch.bool)
    exact, _ = looped_gae(rewards.double(), quantiles.double(), mask, 1.0, 0.95)
    looped, _ = looped_gae(rewards, quantiles, mask, 1.0, 0.95)
    scanned, _ = distributional_gae(rewards, quantiles, mask, 1.0, 0.95)
    assert (scanned - exact).abs().max() < 2 * (looped - exact).abs().max()
    assert (scanned - exact).abs().max() < 1e-4


def test_chunks_of_sequences_change_nothing(monkeypatch):
    monkeypatch.setattr(backends, "backend", lambda tensor: "torch")
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(5, 40, generator=generator) < 0.7
    batch = (torch.randn(5, 40, generator=generator) * mask, torch.randn(5, 40, 3, generator=generator), mask, 0.9, 0.8)
    at_once = distributional_gae(*batch)
    monkeypatch.setattr(returns, "_CHUNK", 2 * 40 * 3)
    for output, expected in zip(distributional_gae(*batch), at_once, strict=True):
        assert torch.equal(output, expected)


def test_at_lam_1_the_targets_of_a_token_are_equal_to_the_last_digit():
    # This is how the loss recognises a point mass. As theta + A they would differ by rounding.
    generator = torch.Generator().manual_seed(3)
    rewards, mask = torch.randn(2, 50, generator=generator), torch.ones(2, 50, dtype=torch.bool)
    targets = distributional_targets(rewards, torch.randn(2, 50, 8, generator=generator), mask, 0.99, 1.0)
    assert (targets == targets[..., :1]).all()
