"""Heads that are no fixed quantiles: histograms over the return, and functions of the level."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.algorithms import ALGORITHMS
from dvpo.core.categorical import histogram_centres
from dvpo.core.quantiles import quantile_huber_loss, quantile_levels
from dvpo.critic import load_critic
from dvpo.errors import InputError
from dvpo.estimates import scalar_estimate
from dvpo.heads import CategoricalHeads, ImplicitHeads, Verdict, VocabularyHead
from dvpo.loading import load_config
from dvpo.trainer import Trainer
from runs import Parity, run_config
from test_algorithms import signals
from test_trainer import LINEAR, farthest, rows, trained, weights

HL_GAUSS, IQN, PLAIN = (ALGORITHMS[name] for name in ("ppo_hl_gauss", "dvpo_iqn", "dvpo_plain"))
CENTRES = histogram_centres(51, 0.0, 1.0, 0.75)
each_row = pytest.mark.parametrize("name", ["ppo_hl_gauss", "dvpo_iqn"])


def wild_implicit(hidden: int = 16, heads: int = 3, quantiles: int = 8) -> ImplicitHeads:
    torch.manual_seed(0)
    module = ImplicitHeads(hidden, heads, quantile_levels(quantiles))
    torch.nn.init.normal_(module.weight)
    return module


# Histograms


def test_a_histogram_begins_without_an_opinion_and_its_atoms_have_its_mean():
    torch.manual_seed(0)
    heads, states_KD = CategoricalHeads(16, 2, 32, CENTRES), torch.randn(5, 16)
    assert heads(states_KD).mean(-1).sub(0.5).abs().max() < 0.01
    torch.nn.init.normal_(heads.linear.weight)
    mean_KN = heads.logits(states_KD).softmax(-1) @ CENTRES.float()
    torch.testing.assert_close(heads(states_KD).mean(-1), mean_KN, rtol=1e-5, atol=1e-5)


def test_the_advantage_is_scalar_gae_on_the_mean_of_the_law_and_the_target_the_lambda_return():
    config = load_config({"algorithm": "ppo_hl_gauss"}, ["advantage.lam=0.8", "advantage.gamma=0.97"])
    for ours, scalar in zip(HL_GAUSS.estimate(signals(), config), scalar_estimate(signals(), config), strict=True):
        torch.testing.assert_close(ours, scalar)


@pytest.mark.parametrize("functional", ["rank", "cvar", "trimmed", "wang"])
def test_the_functionals_of_a_law_read_a_histogram_as_they_read_quantiles(functional: str):
    chosen = [f"advantage.law.functional={functional}"]
    config, plain = (load_config({"algorithm": name}, chosen) for name in ("ppo_hl_gauss", "dvpo_plain"))
    advantages_BT, _ = HL_GAUSS.estimate(signals(), config)
    assert torch.equal(advantages_BT, PLAIN.estimate(signals(), plain)[0])
    assert not torch.allclose(
        advantages_BT, HL_GAUSS.estimate(signals(), load_config({"algorithm": "ppo_hl_gauss"}))[0]
    )


def histogram_terms(targets: list[list[float]]) -> dict[str, Tensor]:
    logits_KNM = torch.zeros(len(targets), 1, len(CENTRES))
    return HL_GAUSS.critic_loss(
        logits_KNM, logits_KNM, torch.tensor(targets), load_config({"algorithm": HL_GAUSS.name})
    )


def test_targets_outside_the_support_are_clipped_and_counted():
    terms = histogram_terms([[0.5], [1.0], [1.3], [-7.0]])
    assert terms["outside"].tolist() == [0, 0, 1, 1]
    # Logits 0: the cross-entropy is log 57 whatever the target.
    torch.testing.assert_close(terms["loss"], torch.full((4,), math.log(57)))
    slopes = []
    for target in (1.0, 1.3):
        logits_KNM = torch.zeros(1, 1, 57, requires_grad=True)
        config = load_config({"algorithm": "ppo_hl_gauss"})
        HL_GAUSS.critic_loss(logits_KNM, logits_KNM, torch.tensor([[target]]), config)["loss"].sum().backward()
        slopes.append(logits_KNM.grad)
    assert torch.equal(*slopes)


def test_a_run_counts_the_targets_outside_its_support_and_goes_on(tmp_path: Path):
    inside = trained(tmp_path / "in", "algorithm=ppo_hl_gauss", "critic.histogram.low=-2", "critic.histogram.high=2")
    outside = trained(tmp_path / "out", "algorithm=ppo_hl_gauss", "critic.histogram.high=0.25")
    assert all(row["critic/outside"] == 0 for row in rows(inside) if "critic/loss" in row)
    assert all(0 < row["critic/outside"] <= 1 for row in rows(outside) if "critic/loss" in row)


# Functions of the level


def test_an_implicit_head_by_hand():
    # D = 1, h = 3 (and h_0 = 1), w = (.5, 2), C cos(pi k tau) with one cosine for each: k = 0 for h_0, k = 1 for h.
    # tau = 1/3: cos 0 = 1, cos(pi/3) = .5:   theta = .5 * 1 + 2 * 3 * .5 = 3.5
    # tau = 2/3: cos(2 pi/3) = -.5, relu: 0:  theta = .5
    heads = ImplicitHeads(1, 1, torch.tensor([1 / 3, 2 / 3]))
    with torch.no_grad():
        heads.embedding.weight.zero_()
        heads.embedding.bias.zero_()
        heads.embedding.weight[0, 0], heads.embedding.weight[1, 1] = 1.0, 1.0
        heads.weight.copy_(torch.tensor([[0.5, 2.0]]))
    torch.testing.assert_close(heads(torch.tensor([[3.0]])), torch.tensor([[[3.5, 0.5]]]))


def test_the_heads_are_independent_and_begin_near_0():
    heads, states_KD = wild_implicit(), torch.randn(5, 16)
    heads(states_KD)[:, 1].sum().backward()
    assert heads.weight.grad[1].abs().max() > 0
    assert (heads.weight.grad[[0, 2]] == 0).all()
    assert ImplicitHeads(16, 3, quantile_levels(8))(states_KD).abs().max() < 0.1


def test_a_draw_takes_one_level_from_each_part_keyed_by_what_it_is_for():
    heads = wild_implicit(quantiles=50)
    drawn = []
    for key in ((0, 1), (0, 2), (0, 1)):
        heads.draw(*key)
        drawn.append(heads.drawn_M.clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn[0] * 50).floor().tolist() == list(range(50))
    assert (drawn[0] * 50 % 1).std() > 0.2  # each at a place of its own: uniform, so .29


def test_the_loss_is_the_exact_quantile_loss_at_the_drawn_levels(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=dvpo_iqn"), task=Parity())
    critic, used = trainer.critic, []
    for _ in range(2):
        trainer.train_step()
        used.append(critic.heads.drawn_M)
    trainer.close()
    assert not torch.allclose(*used)  # drawn anew in every step
    torch.nn.init.normal_(critic.heads.weight)
    states_KD, targets_KL = torch.randn(7, critic.shape.hidden_size), torch.rand(7, 5)
    critic.draw_levels(3, 1)
    predictions_KNM = critic.predictions(states_KD, torch.zeros(7, dtype=torch.long))
    drawn_M = critic.heads.drawn_M
    assert not torch.allclose(drawn_M, quantile_levels(8))
    theta_KNM = critic.heads(states_KD, drawn_M)
    terms = IQN.critic_loss(predictions_KNM, predictions_KNM, targets_KL, trainer.config)
    kappa = trainer.config.critic.kappa
    torch.testing.assert_close(terms["loss"], quantile_huber_loss(theta_KNM, targets_KL, drawn_M, kappa))
    wrong = quantile_huber_loss(theta_KNM, targets_KL, quantile_levels(8), kappa)
    assert not torch.allclose(terms["loss"], wrong)
    assert torch.equal(critic(states_KD), critic.heads(states_KD, quantile_levels(8)))  # values know nothing of draws


def test_at_the_fixed_levels_its_loss_and_gradient_are_those_of_dvpo_with_every_term():
    config = load_config(
        {"algorithm": "dvpo_iqn"}, [f"critic.weights.{n}=0.1" for n in ("cvar", "shape", "consistency")]
    )
    theta_KNM = torch.rand(6, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets_KL = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    packed_KNM = torch.cat([theta_KNM, quantile_levels(32).expand(6, 1, -1)], dim=1)
    losses = []
    for row, predictions_KNM in ((IQN, packed_KNM), (PLAIN, theta_KNM)):
        loss_K = row.critic_loss(predictions_KNM, predictions_KNM, targets_KL, config)["loss"]
        losses.append((loss_K, torch.autograd.grad(loss_K.sum(), theta_KNM)[0]))
    for one, other in zip(*losses, strict=True):
        assert torch.equal(one, other)


def test_trained_at_drawn_levels_it_knows_the_quantile_function_between_them():
    """Returns uniform on [0, 1]: theta(tau) = tau at levels that were never drawn."""
    torch.manual_seed(0)
    heads = ImplicitHeads(1, 1, quantile_levels(8))
    optimiser = torch.optim.Adam(heads.parameters(), lr=3e-3)
    returns_1L = torch.linspace(0, 1, 400).unsqueeze(0)
    for step in range(600):
        heads.draw(step)
        optimiser.zero_grad()
        quantile_huber_loss(heads(torch.ones(1, 1), heads.drawn_M), returns_1L, heads.drawn_M, 0.0).sum().backward()
        optimiser.step()
    levels = torch.tensor([0.1, 0.3, 0.55, 0.9])
    torch.testing.assert_close(heads(torch.ones(1, 1), levels)[0, 0], levels, rtol=0, atol=0.03)


# All kinds


@pytest.mark.parametrize("kind", ["histogram", "implicit", "vocabulary", "verdict"])
def test_heads_compute_in_float32_whatever_type_the_trunk_has(kind: str):
    heads = {
        "histogram": CategoricalHeads(16, 2, 4, CENTRES),
        "implicit": ImplicitHeads(16, 2, quantile_levels(4)),
        "vocabulary": VocabularyHead(16, 9),
        "verdict": Verdict(16, 2),
    }[kind]
    torch.manual_seed(0)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    states_KD = torch.randn(3, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads(states_KD)
    assert found.dtype is torch.float32
    assert torch.equal(found, heads(states_KD.float()))


# Histograms and functions of the level, in a run


@each_row
def test_a_run_is_repeatable_and_does_not_depend_on_the_micro_batch(tmp_path: Path, name: str):
    settings = [*LINEAR, f"algorithm={name}"]
    whole, again = (trained(tmp_path / part, *settings, "update.microbatch_size=6") for part in ("6", "again"))
    assert rows(whole) == rows(again)
    assert farthest(weights(whole), weights(again)) == 0
    assert farthest(weights(trained(tmp_path / "1", *settings, "update.microbatch_size=1")), weights(whole)) < 1e-6


@each_row
def test_a_saved_critic_is_opened_bit_by_bit_and_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, name: str):
    settings = [f"algorithm={name}", "critic.histogram.high=2", "checkpoint.every=1", "steps=3", "checkpoint.keep=3"]
    whole = trained(tmp_path / "whole", *settings)
    again = load_critic(tmp_path / "whole" / "checkpoint-3" / "critic")
    states_KD = torch.randn(4, again.shape.hidden_size)
    assert again.shape == whole.critic.shape
    assert torch.equal(again(states_KD), whole.critic(states_KD))
    half = Trainer(run_config(tmp_path / "half", *settings), task=Parity())
    half.train_step()
    half.save()
    half.close()
    resumed = Trainer(run_config(tmp_path / "half", *settings), task=Parity(), resume=True)
    resumed.train()
    assert farthest(weights(resumed), weights(whole)) == 0


def test_an_implicit_critic_starts_from_the_verdict_and_a_histogram_cannot():
    load_config({"algorithm": "dvpo_iqn"}, ["critic.start=verdict"])
    with pytest.raises(InputError, match=r"algorithm = ppo_hl_gauss learns a histogram: set it to random"):
        load_config({"algorithm": "ppo_hl_gauss"}, ["critic.start=verdict"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("critic.histogram.high=0", "critic.histogram.low = 0 is not below critic.histogram.high = 0: give the least"),
        ("critic.histogram.bins=1", "critic.histogram.bins"),
        ("critic.histogram.sigma=0", "critic.histogram.sigma"),
    ],
)
def test_a_support_that_is_none_is_refused(setting: str, words: str):
    with pytest.raises(InputError, match=words):
        load_config({"algorithm": "ppo_hl_gauss"}, [setting])


def test_a_rank_of_a_histogram_needs_no_clipped_deltas():
    settings = ["advantage.law.functional=rank", "advantage.delta_clip=1"]
    with pytest.raises(InputError, match="clips nothing in a rank"):
        load_config({"algorithm": "ppo_hl_gauss"}, settings)
