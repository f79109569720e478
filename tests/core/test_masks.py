import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.core.masks import (
    at_least_float32,
    masked_mean,
    masked_sum,
    masked_variance,
    rows_where,
    token_count,
    whiten,
    zero_masked,
)

GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def test_worked_example():
    # Policy tokens 1, 2, 6: sum 9, mean 3, population variance (4 + 1 + 9) / 3 = 14/3.
    values_BT = torch.tensor([[1.0, math.nan], [2.0, 6.0]])
    mask_BT = torch.tensor([[1, 0], [1, 1]])
    assert masked_sum(values_BT, mask_BT) == 9.0
    assert token_count(mask_BT) == 3
    assert masked_mean(values_BT, mask_BT) == 3.0
    torch.testing.assert_close(masked_variance(values_BT, mask_BT), torch.tensor(14 / 3))
    # Whitened: (-2, -1, 3) / sqrt(14/3).
    expected_BT = torch.tensor([[-2.0, 0.0], [-1.0, 3.0]]) / math.sqrt(14 / 3)
    torch.testing.assert_close(whiten(values_BT, mask_BT), expected_BT)


def test_rows_where_the_mask_is_one_and_their_gradient_are_those_of_indexing():
    values_BUN = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    mask_BU = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    grad_KN = torch.randn(8, 2, dtype=torch.float64)
    taken_KN, indexed_KN = rows_where(values_BUN, mask_BU), values_BUN[mask_BU]
    assert torch.equal(taken_KN, indexed_KN)
    assert torch.equal(*(torch.autograd.grad(x, values_BUN, grad_KN)[0] for x in (taken_KN, indexed_KN)))
    assert rows_where(values_BUN, torch.zeros_like(mask_BU)).shape == (0, 2)


def test_an_empty_mask_gives_zeros_and_a_count_of_one():
    values_BT, mask_BT = torch.full((2, 3), math.nan), torch.zeros(2, 3)
    assert token_count(mask_BT) == 1
    assert masked_mean(values_BT, mask_BT) == 0.0
    assert masked_variance(values_BT, mask_BT) == 0.0
    assert torch.equal(whiten(values_BT, mask_BT), torch.zeros(2, 3))


def test_whitening_divides_by_the_deviation_plus_1e_8():
    # Deviation 1e-6: 1e-6 / (1e-6 + 1e-8) = .990. With the constant under the root it would be 1e-6 / 1e-4 = .01.
    values_BT = torch.tensor([[1e-6, -1e-6]])
    torch.testing.assert_close(whiten(values_BT, torch.ones(1, 2)), torch.tensor([[1.0, -1.0]]) / 1.01)


def test_equal_advantages_whiten_to_zero_not_to_nan():
    assert torch.equal(whiten(torch.full((2, 2), 7.0), torch.ones(2, 2)), torch.zeros(2, 2))


@given(seed=st.integers(0, 2**31), junk=st.sampled_from(GARBAGE))
@settings(max_examples=30, deadline=None)
def test_garbage_at_masked_positions_changes_nothing(seed, junk):
    generator = torch.Generator().manual_seed(seed)
    values_BT = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(3, 5, generator=generator) < 0.6
    dirty_BT = torch.where(mask_BT, values_BT, junk)
    chosen_K = values_BT[mask_BT]
    if chosen_K.numel():
        torch.testing.assert_close(masked_mean(dirty_BT, mask_BT), chosen_K.mean())
        torch.testing.assert_close(masked_variance(dirty_BT, mask_BT), chosen_K.var(correction=0))
    white_BT = whiten(dirty_BT, mask_BT)
    assert torch.equal(white_BT[~mask_BT], torch.zeros_like(white_BT[~mask_BT]))
    torch.testing.assert_close(white_BT, whiten(zero_masked(values_BT, mask_BT), mask_BT))


def test_zeroing_the_inputs_cleans_the_gradient_and_zeroing_the_result_does_not():
    mask_T = torch.tensor([1, 0])

    def gradient(clean_inputs: bool) -> torch.Tensor:
        x_T = torch.tensor([0.5, math.inf], requires_grad=True)
        y_T = (zero_masked(x_T, mask_T) if clean_inputs else x_T).square()
        (y_T - y_T.detach() + zero_masked(y_T * 3.0, mask_T)).sum().backward()
        return x_T.grad

    # d/dx (x^2 + 3 x^2) = 8 x = 4 at the policy token.
    assert torch.equal(gradient(clean_inputs=True), torch.tensor([4.0, 0.0]))
    assert not gradient(clean_inputs=False).isfinite().all()


def test_trailing_dimensions_are_zeroed_together():
    values_BTM = torch.ones(1, 3, 2)
    assert torch.equal(zero_masked(values_BTM, torch.tensor([[1, 0, 1]])).sum(-1), torch.tensor([[2.0, 0.0, 2.0]]))


def in_processes(function, parts):
    """Call `function(part, reduce)` for all parts at once, with a `reduce` that really sums over them."""
    barrier, slots = threading.Barrier(len(parts), timeout=120), [torch.zeros(())] * len(parts)

    def process(rank):
        def reduce(tensor):
            slots[rank] = tensor
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return function(parts[rank], reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(process, range(len(parts))))


def test_whitening_is_global_over_processes_and_a_local_one_is_rejected():
    generator = torch.Generator().manual_seed(0)
    # One process holds the good samples, the other the bad ones: whitened locally, the difference would
    # vanish.
    values_BT = torch.randn(6, 4, generator=generator) + torch.tensor([3.0] * 2 + [-3.0] * 4)[:, None]
    mask_BT = torch.rand(6, 4, generator=generator) < 0.7
    parts = [(values_BT[:2], mask_BT[:2]), (values_BT[2:], mask_BT[2:])]
    expected_BT = whiten(values_BT, mask_BT)
    torch.testing.assert_close(
        torch.cat(in_processes(lambda part, reduce: whiten(*part, reduce=reduce), parts)), expected_BT
    )
    local_BT = torch.cat([whiten(*part) for part in parts])
    assert (local_BT - expected_BT).abs().max() > 0.5
    means = in_processes(lambda part, reduce: masked_mean(*part, reduce=reduce), parts)
    assert means[0] == means[1]
    torch.testing.assert_close(means[0], masked_mean(values_BT, mask_BT))
    # A process without a token counts as none: the sum 6 of two tokens has the mean 3, not 6 / (2 + 1).
    idle = [(torch.tensor([2.0, 4.0]), torch.ones(2)), (torch.ones(2), torch.zeros(2))]
    assert in_processes(lambda part, reduce: masked_mean(*part, reduce=reduce), idle) == [3.0, 3.0]


def test_whitening_survives_an_offset_in_float32():
    generator = torch.Generator().manual_seed(1)
    # Multiples of 1/64 stay exact at 1e4, so that the offset itself loses nothing.
    values_BT = torch.randint(-64, 64, (8, 500), generator=generator) / 64.0
    mask_BT = torch.ones(8, 500)
    expected_BT = whiten(values_BT.double(), mask_BT)
    torch.testing.assert_close(whiten(values_BT + 1e4, mask_BT).double(), expected_BT, rtol=1e-5, atol=1e-5)
    # The one-pass formula E[x^2] - E[x]^2, which this must not be, has no digit left there.
    offset_BT = values_BT + 1e4
    one_pass = offset_BT.square().mean() - offset_BT.mean().square()
    assert abs(one_pass / values_BT.var(correction=0) - 1) > 0.5


@pytest.mark.parametrize(
    ("given_dtype", "used"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_computation_is_in_float32_at_least(given_dtype, used):
    values_T = torch.ones(4, dtype=given_dtype)
    assert at_least_float32(values_T).dtype == used
    assert masked_mean(values_T, torch.ones(4)).dtype == used
    assert whiten(values_T, torch.ones(4)).dtype == used


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\) and mask \(3, 2\)"):
        masked_mean(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        zero_masked(torch.ones(2), torch.ones(3))
