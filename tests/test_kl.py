"""The adaptive KL coefficient: the published rule, its state, and what it steers."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dvpo.core.losses import kl_estimate
from dvpo.errors import InputError
from dvpo.kl import KLController
from dvpo.loading import load_config
from dvpo.settings_learning import KLConfig
from runs import Parity, farthest, rows, run_config, trained, weights


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (0.11, 0.2 * (1 + 0.1 * 100 / 1000)),  # 10% too far: .202
        (0.1, 0.2),
        (0.09, 0.2 * (1 - 0.1 * 100 / 1000)),
        (9.0, 0.2 * (1 + 0.2 * 100 / 1000)),  # the error counts as 20% at most: .204
        (0.0, 0.2 * (1 - 0.2 * 100 / 1000)),
        (math.nan, 0.2),  # a step without a training token
    ],
)
def test_the_rule_by_hand(divergence: float, expected: float) -> None:
    controller = KLController(KLConfig(coef=0.2, target=0.1, horizon=1000))
    controller.observe(divergence, responses=100)
    assert controller.coef == pytest.approx(expected)


def test_a_resume_goes_on_where_the_coefficient_stood_unless_it_is_given_another() -> None:
    controller = KLController(KLConfig(coef=0.2, target=0.1, horizon=1000))
    controller.observe(9.0, responses=100)
    for began_at, expected in ((0.2, controller.coef), (1.0, 1.0)):
        resumed = KLController(KLConfig(coef=began_at, target=0.1, horizon=1000))
        resumed.load_state_dict(controller.state_dict())
        assert resumed.coef == expected
    resumed.load_state_dict({"coef": 0.3})  # of a checkpoint that does not say where it began
    assert resumed.coef == 0.3


def test_without_a_target_the_coefficient_stays() -> None:
    controller = KLController(KLConfig(coef=0.2))
    controller.observe(9.0, responses=100)
    assert controller.coef == 0.2
    assert not controller.adaptive


ADAPTIVE = ["actor.kl.coef=0.5", "actor.kl.target=0.001", "actor.kl.horizon=6"]


def test_each_step_uses_and_logs_the_coefficient_that_the_steps_before_have_made(tmp_path: Path) -> None:
    logged = rows(trained(tmp_path / "run", *ADAPTIVE, "steps=5", "policy_optimiser.lr=3e-3"))
    assert logged[0]["actor/kl_coef"] == 0.5
    assert logged[0]["actor/kl_sampled"] < 1e-9  # the policy is still the starting one
    for before, after in pairwise(logged):
        error = min(max(before["actor/kl_sampled"] / 0.001 - 1, -0.2), 0.2)
        assert after["actor/kl_coef"] == pytest.approx(before["actor/kl_coef"] * (1 + error))
    assert logged[1]["actor/kl_coef"] == pytest.approx(0.4)
    assert logged[-1]["actor/kl_coef"] > logged[1]["actor/kl_coef"]  # by then it has gone too far


def test_the_coefficient_waits_for_a_policy_at_rest(tmp_path: Path) -> None:
    logged = rows(trained(tmp_path / "run", *ADAPTIVE, "steps=4", "update.actor_warmup_steps=2"))
    assert [row["actor/kl_coef"] for row in logged[:3]] == [0.5, 0.5, 0.5]
    assert logged[3]["actor/kl_coef"] == pytest.approx(0.4)  # of the third step, whose policy was still the first


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_steered_coefficient_is_the_one_that_trains(tmp_path: Path, place: str) -> None:
    settings = ["actor.kl.coef=0.5", f"actor.kl.place={place}", "steps=3", "policy_optimiser.lr=3e-3"]
    fixed = trained(tmp_path / "fixed", *settings)
    steered = trained(tmp_path / "steered", *settings, *ADAPTIVE)
    assert farthest(weights(fixed), weights(steered)) > 0
    assert "actor/kl_coef" not in rows(fixed)[0]  # what is off leaves no trace


def test_its_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    settings = [*ADAPTIVE, "checkpoint.every=2", "policy_optimiser.lr=3e-3"]
    whole = trained(tmp_path / "whole", *settings, "steps=4")
    trained(tmp_path / "parts", *settings, "steps=2")
    parts = trained(tmp_path / "parts", *settings, "steps=4", task=Parity(), resume=True)
    assert rows(parts) == rows(whole)
    assert parts.kl.coef == whole.kl.coef != 0.5
    assert farthest(weights(parts), weights(whole)) == 0


def test_what_cannot_be_steered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"actor.kl.target = 0.1 steers a coefficient that is 0"):
        load_config({"actor": {"kl": {"target": 0.1}}})
    with pytest.raises(InputError, match=r"actor.kl.horizon = 5 is shorter than a step of 6 responses: raise it"):
        run_config(tmp_path, "actor.kl.coef=1", "actor.kl.target=1", "actor.kl.horizon=5")


def test_in_the_loss_k1_has_a_mean_gradient_of_zero_and_k2_and_k3_those_of_the_two_divergences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(7, generator=generator, requires_grad=True)
    reference_V = torch.randn(7, generator=generator).log_softmax(dim=0)

    def mean_gradient(estimator: str) -> torch.Tensor:
        """Of the estimate, over all tokens, each as often as the policy draws it."""
        policy_V = logits_V.log_softmax(dim=0)
        estimates_V = kl_estimate(policy_V, reference_V, estimator)
        return torch.autograd.grad((policy_V.detach().exp() * estimates_V).sum(), logits_V)[0]

    policy_V = logits_V.log_softmax(dim=0)
    to_reference = (policy_V.exp() * (policy_V - reference_V)).sum()
    from_reference = (reference_V.exp() * (reference_V - policy_V)).sum()
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros(7), atol=1e-6, rtol=0)
    for estimator, divergence in (("k2", to_reference), ("k3", from_reference)):
        expected = torch.autograd.grad(divergence, logits_V, retain_graph=True)[0]
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(mean_gradient(estimator), expected, atol=1e-6, rtol=1e-5)
