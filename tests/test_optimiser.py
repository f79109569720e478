"""The optimiser: schedules by hand, clipping of each module by itself, and updates that do not happen."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dvpo import optimiser as optimisers
from dvpo.loading import load_config
from dvpo.optimiser import Optimiser, learning_rate, warn_of_rate
from dvpo.settings_learning import OptimiserConfig
from dvpo.trainer import Trainer
from runs import Parity, run_config


def module_with_gradient(*gradient: float) -> nn.Module:
    module = nn.Linear(len(gradient), 1, bias=False)
    nn.init.ones_(module.weight)
    module.weight.grad = torch.tensor([gradient])
    return module


def optimiser(module: nn.Module, steps: int = 10, **settings: Any) -> Optimiser:
    return Optimiser(module, OptimiserConfig(**{"lr": 0.1, **settings}), steps)


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 2, 1, 1, 1, 1, 1]),
        # From 1 down to 0, which a seventh step would have.
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        # (1 - cos(pi x)) / 2 for x = 1, 3/4, 1/2, 1/4; cos(pi 3/4) = -.70711
        ("cosine", 2, [1 / 2, 1, 1, 0.853553, 0.5, 0.146447]),
        ("cosine", 6, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ],
)
def test_learning_rates_of_six_steps_by_hand(schedule, warmup, rates):
    settings = OptimiserConfig(lr=2.0, schedule=schedule, warmup_steps=warmup)
    assert [learning_rate(settings, step, 6) for step in range(1, 7)] == pytest.approx([2 * r for r in rates], rel=1e-5)
    if schedule != "constant":  # a loop of one's own may go on: never uphill, never up again
        assert learning_rate(settings, 7, 6) == learning_rate(settings, 9, 6) == 0


def test_a_warm_up_longer_than_the_run_just_rises():
    settings = OptimiserConfig(lr=1.0, schedule="linear", warmup_steps=10)
    assert [learning_rate(settings, step, 3) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])


def test_the_rate_of_the_training_step_moves_the_weights():
    module = module_with_gradient(5.0)
    ours = optimiser(module, steps=4, schedule="linear")
    # AdamW's first step is the rate itself, against the gradient's sign: .1 * (4 - 3 + 1) / 4 = .05.
    assert ours.update(3) == (5.0, True)
    torch.testing.assert_close(module.weight.data, torch.tensor([[0.95]]))
    assert module.weight.grad is None


def test_the_gradient_is_clipped_by_its_norm_and_the_norm_before_is_reported():
    module = module_with_gradient(3.0, 4.0)
    ours = optimiser(module, betas=(0.9, 0.999), max_grad_norm=1.0)
    assert ours.update(1) == (5.0, True)
    # AdamW's first moment after one step is (1 - .9) times the gradient it saw, here (3, 4) / 5.
    first_moment = ours.adamw.state[module.weight]["exp_avg"]
    torch.testing.assert_close(first_moment, torch.tensor([[0.06, 0.08]]), rtol=1e-4, atol=1e-6)


def test_a_large_gradient_of_the_critic_does_not_shrink_the_policys():
    policy, critic = module_with_gradient(0.3, 0.4), module_with_gradient(3e6, 4e6)
    of_policy, of_critic = optimiser(policy), optimiser(critic)
    assert of_critic.update(1) == (5e6, True)
    assert of_policy.update(1) == (pytest.approx(0.5), True)
    first_moment = of_policy.adamw.state[policy.weight]["exp_avg"]
    torch.testing.assert_close(first_moment, torch.tensor([[0.03, 0.04]]))  # below the limit: as it is


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_weights_moments_and_step_count_untouched(bad):
    module = module_with_gradient(1.0, 2.0)
    ours = optimiser(module)
    ours.update(1)
    weights, state = module.weight.detach().clone(), copy.deepcopy(ours.state_dict())
    module.weight.grad = torch.tensor([[1.0, bad]])
    norm, moved = ours.update(2)
    assert not math.isfinite(norm)
    assert not moved
    assert torch.equal(module.weight, weights)
    assert module.weight.grad is None  # nor does it linger
    for before, after in zip(state["state"][0].values(), ours.state_dict()["state"][0].values(), strict=True):
        assert torch.equal(before, after)
    module.weight.grad = torch.tensor([[1.0, 2.0]])
    assert ours.update(3)[1]
    assert bool(module.weight.isfinite().all())


def test_adamw_has_the_sections_settings_from_the_first_step():
    ours = optimiser(nn.Linear(2, 1), betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)
    (group,) = ours.adamw.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.1)


def test_frozen_parameters_are_not_its_matter():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    ours = optimiser(module, weight_decay=0.5)
    module(torch.ones(1, 2)).sum().backward()
    ours.update(1)
    assert torch.equal(module[0].weight, before)
    assert len(ours.parameters) == 2


def test_a_restored_optimiser_goes_on_bit_for_bit():
    torch.manual_seed(0)
    data_KD = torch.randn(8, 3)

    def learn(module: nn.Module, ours: Optimiser, steps: range) -> None:
        for step in steps:
            module(data_KD).square().sum().backward()
            ours.update(step)

    whole = nn.Linear(3, 1)
    first = copy.deepcopy(whole)
    learn(whole, optimiser(whole, schedule="cosine"), range(1, 9))
    before = optimiser(first, schedule="cosine")
    learn(first, before, range(1, 5))
    second = copy.deepcopy(first)
    after = optimiser(second, schedule="cosine")
    after.load_state_dict(before.state_dict())
    learn(second, after, range(5, 9))
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)


def test_a_resume_goes_by_the_settings_that_it_was_given_and_keeps_the_moments():
    old = optimiser(module_with_gradient(3.0, 4.0))
    old.update(1)
    new = optimiser(nn.Linear(2, 1, bias=False), weight_decay=0.1, betas=(0.5, 0.6), eps=1e-3)
    new.load_state_dict(old.state_dict())
    (group,) = new.adamw.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.5, 0.6), 1e-3)
    moments = [one.adamw.state[one.parameters[0]]["exp_avg"] for one in (old, new)]
    assert moments[0].abs().min() > 0
    assert torch.equal(*moments)


# The embedded model's rate at a large one


def test_a_large_policy_at_a_small_ones_rate_is_warned_of_with_the_settings_to_copy() -> None:
    model = nn.Linear(50_001, 1_000, bias=False, device="meta")
    words = (
        r"policy_optimiser\.lr = 0\.0003 suits .* 50 million parameters, .*: "
        r"set policy_optimiser\.lr=1e-6 critic_optimiser\.lr=1e-5$"
    )
    with pytest.warns(UserWarning, match=words):
        warn_of_rate(model, load_config())


@pytest.mark.parametrize(
    ("inputs", "settings"),
    [(50_000, []), (50_001, ["policy_optimiser.lr=2e-5"]), (50_001, ["model.lora.rank=8"])],
    ids=["small", "low", "adapters"],
)
def test_a_rate_that_may_fit_is_not_warned_of(inputs: int, settings: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rate(nn.Linear(inputs, 1_000, bias=False, device="meta"), load_config(None, settings))


def test_a_run_warns_of_its_policys_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "LARGE", 1_000)
    with pytest.warns(UserWarning, match=r"^policy_optimiser\.lr"):
        Trainer(run_config(tmp_path / "run", "algorithm=grpo"), task=Parity()).close()
