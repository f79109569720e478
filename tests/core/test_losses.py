import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.core.losses import (
    aggregation_weights,
    clipped_surrogate,
    huber_value_loss,
    kl_estimate,
    truncated_ratio,
    value_loss,
)
from dvpo.core.masks import zero_masked

KINDS = ["token_mean", "seq_mean_token_mean", "seq_sum_fixed_length"]


# Clipped surrogate


def test_clipped_surrogate_worked_example():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1, 1.5 with clip [0.8, 1.3]:
    #   A = +1, ratio 1.5: min(1.5, 1.3) = 1.3, held back        A = -1: min(-1.5, -1.3) = -1.5, not held back
    #   A = +1, ratio 0.5: min(0.5, 0.8) = 0.5, not held back    A = -1: min(-0.5, -0.8) = -0.8, held back
    #   A = +2, ratio 1.1: 2.2, inside                           A = 0: nothing to hold back
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.0])
    loss, clipped = clipped_surrogate(logprobs, torch.zeros(6), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8, -2.2, 0.0]))
    assert clipped.tolist() == [True, False, False, True, False, False]
    loss.sum().backward()
    # d(-ratio A)/dlogp = -ratio A where not held back.
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.5, -0.5, 0.0, -2.2, 0.0]))


def test_at_the_first_update_the_surrogate_is_the_policy_gradient():
    logprobs = torch.tensor([-0.3, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    loss, clipped = clipped_surrogate(logprobs, logprobs.detach().clone(), advantages, 0.2, 0.2)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "gradient"),
    [
        # loss = -ratio A where the clip does not hold it back: A < 0 above, A > 0 below. d loss / d logp = -ratio A.
        (20.0, -1.0, math.exp(20.0)),  # at the clamp still the exponential's
        (-20.0, 1.0, -math.exp(-20.0)),
        (19.5, -1.0, math.exp(19.5)),
        (20.5, -1.0, 0.0),  # beyond it none
        (-20.5, 1.0, 0.0),
        (1e30, -1.0, 0.0),
    ],
)
def test_the_gradient_is_the_exponentials_up_to_the_clamp_of_the_log_ratio_and_0_beyond(log_ratio, advantage, gradient):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = clipped_surrogate(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([gradient]))


def test_a_log_ratio_of_a_thousand_gives_neither_infinity_nor_nan():
    logprobs = torch.tensor([0.0, -1000.0], requires_grad=True)
    loss, _ = clipped_surrogate(logprobs, torch.tensor([-1000.0, 0.0]), torch.tensor([-1.0, 1.0]), 0.2, 0.2)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([math.exp(20.0), -math.exp(-20.0)]))
    assert logprobs.grad.tolist() == [0.0, 0.0]


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_surrogate_gradient_equals_finite_differences(seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(6, generator=generator, dtype=torch.float64) * 0.5
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    ratio = logprobs.exp()
    # Away from the kinks at 0.8 and 1.2.
    logprobs = torch.where(((ratio - 0.8).abs() < 1e-3) | ((ratio - 1.2).abs() < 1e-3), 0.0, logprobs)
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, torch.zeros(6, dtype=torch.float64), advantages, 0.2, 0.2)[0],
        (logprobs,),
    )


def test_truncated_ratio_worked_example():
    # The policy's probabilities over the sampler's: .6/.2 = 3, capped at 2; .1/.4 = .25; .5/.5 = 1.
    logprobs = torch.tensor([0.6, 0.1, 0.5]).log().requires_grad_()
    weights, capped = truncated_ratio(logprobs, torch.tensor([0.2, 0.4, 0.5]).log(), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.25, 1.0]))
    assert capped.tolist() == [1, 0, 0]
    assert not weights.requires_grad
    assert not truncated_ratio(logprobs, logprobs, cap=1.0)[1].any()  # a cap that is just reached takes nothing away


# Value losses


def test_value_loss_worked_example():
    # v = 2, v_old = 1, R = 3, c = 0.5: the clipped value is 1.5, max((2-3)^2, (1.5-3)^2) / 2 = 1.125.
    values = torch.tensor([2.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([1.0]), torch.tensor([3.0]), value_clip=0.5)
    torch.testing.assert_close(loss, torch.tensor([1.125]))
    loss.sum().backward()
    assert values.grad.item() == 0.0  # the value has left its range towards the target: no further push
    # Away from the target (R = 0) the plain error is the larger, 4 / 2, and pulls back.
    values = torch.tensor([2.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([1.0]), torch.tensor([0.0]), value_clip=0.5)
    loss.sum().backward()
    assert loss.item() == 2.0
    assert values.grad.item() == 2.0
    # Without clipping: (2-3)^2 / 2.
    assert value_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([3.0]), None).item() == 0.5


def test_one_target_serves_several_heads_but_heads_never_broadcast_to_targets():
    values_KN = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    loss_KN = value_loss(values_KN, values_KN, torch.tensor([[2.0], [2.0]]), None)
    torch.testing.assert_close(loss_KN, torch.tensor([[0.5, 0.5], [2.0, 0.0]]))
    with pytest.raises(ValueError, match="broadcast"):
        value_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), None)


def test_huber_value_loss_worked_example():
    # kappa = 0.5: |u| = 0.2 -> 0.04 / 1 = 0.04;  |u| = 0.5 -> 0.25 from both sides;  |u| = 2 -> 2 - 0.25 =
    # 1.75.
    loss = huber_value_loss(torch.tensor([0.2, -0.5, 2.0]), torch.zeros(3), kappa=0.5)
    torch.testing.assert_close(loss, torch.tensor([0.04, 0.25, 1.75]))
    values = torch.tensor([0.2, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: huber_value_loss(v, torch.zeros(2).double(), 0.5), (values,))
    # Without a quadratic zone it is the absolute error.
    torch.testing.assert_close(
        huber_value_loss(torch.tensor([0.2, -2.0]), torch.zeros(2), 0.0), torch.tensor([0.2, 2.0])
    )
    with pytest.raises(ValueError, match="kappa must be at least 0, got -1"):
        huber_value_loss(values, values, -1)
    # Wide enough, it is the squared error over kappa.
    errors = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(
        huber_value_loss(errors, torch.zeros(7), 10.0) * 10.0,
        value_loss(errors, errors, torch.zeros(7), None),
    )


def test_no_gradient_reaches_targets_advantages_or_old_quantities():
    leaves = [torch.rand(3, requires_grad=True) for _ in range(6)]
    x, old, advantage, returns, reference, old_values = leaves
    loss = clipped_surrogate(x, old, advantage, 0.2, 0.2)[0].sum()
    loss = loss + value_loss(x, old_values, returns, 0.5).sum() + huber_value_loss(x, returns, 0.1).sum()
    loss = loss + kl_estimate(x, reference, "k3").sum()
    loss.backward()
    assert x.grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


# KL estimators


def test_kl_estimators_worked_example_and_expectations():
    # d = 0.5: k1 = .5, k2 = .125, k3 = exp(-.5) - 1 + .5 = .10653066.
    logp, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    expected = {"k1": 0.5, "k2": 0.125, "k3": 0.10653066}
    for kind, value in expected.items():
        torch.testing.assert_close(kl_estimate(logp, reference, kind), torch.tensor([value]))
    # Over a whole vocabulary, k1 and k3 have the mean KL(policy || reference) = sum p log(p/q).
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    true_kl = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind)).sum(), true_kl)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradients_equal_finite_differences_and_stay_finite(kind):
    x = torch.tensor([-0.5, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logp: kl_estimate(logp, reference, kind), (x,))
    far = torch.tensor([-1000.0], requires_grad=True)
    estimate = kl_estimate(far, torch.zeros(1), kind)
    estimate.sum().backward()
    assert estimate.isfinite().all()
    assert far.grad.isfinite().all()


# Aggregation


def weighted_sum(losses, weights):
    """As training adds up: of the tokens that count alone."""
    kept = weights != 0
    return (weights[kept] * losses[kept]).sum()


def test_aggregation_worked_example():
    # Two sequences with losses (1, 2, 3) and (10), configured length 4, and one masked-out sequence:
    #   token_mean            (1+2+3+10) / 4   = 4
    #   seq_mean_token_mean   ((1+2+3)/3 + 10) / 2 = 6
    #   seq_sum_fixed_length  (1+2+3+10) / (4 * 2) = 2
    losses_BT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, math.nan], [math.nan, 5.0, 5.0]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    for kind, expected in zip(KINDS, (4.0, 6.0, 2.0), strict=True):
        weights_BT, denominator = aggregation_weights(mask_BT, kind, fixed_length=4)
        assert (weighted_sum(losses_BT, weights_BT) / denominator).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train_on_gives_zero(kind):
    weights_BT, denominator = aggregation_weights(torch.zeros(2, 3), kind, fixed_length=4)
    assert (weighted_sum(torch.full((2, 3), math.nan), weights_BT) / denominator).item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(6, 5, generator=generator) < 0.5
    x_BT = torch.randn(6, 5, generator=generator, dtype=torch.float64)

    def whole(rows_per_micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        leaf_BT = x_BT.clone().requires_grad_()
        weights_BT, denominator = aggregation_weights(mask_BT, kind, fixed_length=7)
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(6).split(rows_per_micro_batch):
            loss = weighted_sum(leaf_BT[rows].square(), weights_BT[rows]) / denominator
            loss.backward()
            total += loss.detach()
        return total, leaf_BT.grad

    expected, expected_gradient = whole(6)
    for rows_per_micro_batch in (1, 2, 4):
        total, gradient = whole(rows_per_micro_batch)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_denominator_per_micro_batch_is_rejected():
    # The wrong variant: the mean of micro-batch means is (6/3 + 10/1) / 2 = 6, but the token mean is 16 / 4 =
    # 4.
    losses_BT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0]])
    wrong = torch.zeros(())
    for row in range(2):
        weights_BT, denominator = aggregation_weights(mask_BT[row : row + 1], "token_mean")
        wrong += weighted_sum(losses_BT[row : row + 1], weights_BT) / denominator / 2
    weights_BT, denominator = aggregation_weights(mask_BT, "token_mean")
    assert (weighted_sum(losses_BT, weights_BT) / denominator).item() == 4.0
    assert wrong.item() == 6.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_denominator_is_summed_over_processes(kind):
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    losses_BT = torch.arange(12.0).reshape(4, 3)
    weights_BT, denominator = aggregation_weights(mask_BT, kind, 5)
    counts = {"token_mean": [3, 3]}.get(kind, [2, 1])  # tokens or sequences of the two processes
    total = torch.zeros(())
    for rows, own in zip((slice(0, 2), slice(2, 4)), counts, strict=True):

        def reduce(count, own=own):
            assert count.item() == own
            return torch.tensor(sum(counts))

        part_BT, part_denominator = aggregation_weights(mask_BT[rows], kind, 5, reduce)
        assert part_denominator == denominator
        total += weighted_sum(losses_BT[rows], part_BT) / part_denominator
    torch.testing.assert_close(total, weighted_sum(losses_BT, weights_BT) / denominator)


def test_garbage_at_masked_positions_reaches_neither_loss_nor_gradient():
    mask_BT = torch.tensor([[1, 0, 0]])
    raw_BT = torch.tensor([[-1.0, math.nan, math.inf]], requires_grad=True)
    logprobs_BT = zero_masked(raw_BT, mask_BT)
    old_BT = zero_masked(torch.tensor([[-1.0, math.nan, -1.0]]), mask_BT)
    loss_BT, _ = clipped_surrogate(logprobs_BT, old_BT, torch.ones(1, 3), 0.2, 0.2)
    weights_BT, denominator = aggregation_weights(mask_BT, "token_mean")
    loss = weighted_sum(loss_BT, weights_BT) / denominator
    loss.backward()
    assert loss.item() == -1.0
    assert raw_BT.grad.tolist() == [[-1.0, 0.0, 0.0]]


# Dtypes and bad input


def test_bf16_inputs_are_computed_in_float32():
    # .1 and .3 in bf16, whose difference, squares and exponentials bf16 would round to 8 bits.
    x, y, z = torch.tensor([[0.1, 0.2], [0.3, 0.7], [-1.1, 0.9]], dtype=torch.bfloat16)
    for loss in (
        lambda a, b, c: clipped_surrogate(a, b, c, 0.2, 0.2)[0],
        lambda a, b, c: value_loss(a, b, c, 0.5),
        lambda a, b, c: huber_value_loss(a, c, 0.5),
        lambda a, b, c: kl_estimate(a, b, "k3"),
    ):
        torch.testing.assert_close(loss(x, y, z), loss(x.float(), y.float(), z.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: clipped_surrogate(torch.zeros(2), torch.zeros(3), torch.zeros(2), 0.2, 0.2), "one shape"),
        (lambda: clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2), -0.1, 0.2), "clip_low"),
        (lambda: clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.2, float("nan")), "clip_high"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(1), torch.zeros(2), None), "one shape"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.0), "value_clip"),
        (lambda: huber_value_loss(torch.zeros(2), torch.zeros(2), -0.1), "kappa"),
        (lambda: kl_estimate(torch.zeros(2), torch.zeros(2), "k4"), "k1, k2 or k3"),
        (lambda: aggregation_weights(torch.ones(2), "token_mean"), "mask"),
        (lambda: aggregation_weights(torch.ones(2, 2), "mean"), "kind must be token_mean"),
        (lambda: aggregation_weights(torch.ones(2, 2), "seq_sum_fixed_length"), "fixed_length"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, words):
    with pytest.raises(ValueError, match=words):
        call()
