"""The rows compose the functions of `core` as the method page says, and a user's own row runs as it is."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.algorithms import ALGORITHMS, Algorithm, Signals, distributional_estimate, find_algorithm, scalar_estimate
from dvpo.config import Config
from dvpo.core.quantiles import quantile_huber_loss, quantile_levels
from dvpo.core.tail_law import law_tail_terms
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.trainer import Trainer
from runs import Parity, run_config

EXAMPLES = Path(__file__).parents[1] / "examples"
DVPO, PPO = ALGORITHMS["dvpo_paper"], ALGORITHMS["ppo"]
MEAN = "advantage.law.functional=mean"
TERMS = ("risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")
OFF = [f"critic.weights.{term}=0" for term in TERMS]


def signals(num_heads: int = 3, num_quantiles: int = 5, **changes: object) -> Signals:
    """Four responses of up to six tokens; the second has a gap (an environment's turn), the last is cut short."""
    draw = torch.Generator().manual_seed(7)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    rewards_BT = torch.zeros(4, 6)
    rewards_BT[[0, 1, 2, 3], [5, 5, 2, 3]] = torch.tensor([1.0, 0.0, 1.0, 0.5])
    return dataclasses.replace(
        Signals(
            rewards_BT=rewards_BT,
            mask_BT=mask_BT,
            values_BTNM=torch.rand(4, 6, num_heads, num_quantiles, generator=draw),
            bootstrap_BNM=torch.rand(4, num_heads, num_quantiles, generator=draw)
            * torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1),
            zero_last_delta_B=torch.tensor([False, False, True, False]),
            groups_B=torch.tensor([0, 0, 1, 1]),
            rewarded_B=torch.tensor([True, True, False, True]),
            seed=3,
        ),
        **changes,  # type: ignore[arg-type]
    )


def predictions(num_heads: int, num_quantiles: int, num_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    predictions_KNM = torch.rand(9, num_heads, num_quantiles, generator=draw)
    before_KNM = predictions_KNM + 0.2 * torch.rand(predictions_KNM.shape, generator=draw)
    return predictions_KNM, before_KNM, torch.rand(9, num_targets, generator=draw)


# Advantages and targets


def test_the_mean_over_quantiles_of_the_distributional_advantage_is_the_scalar_one_of_the_mean():
    config = load_config(None, [MEAN, "advantage.lam=0.8", "advantage.gamma=0.97"])
    at = signals()
    scalar, returns_BT1 = scalar_estimate(at, config)
    distributional, targets_BTM = distributional_estimate(at, config)
    torch.testing.assert_close(distributional, scalar)
    torch.testing.assert_close(targets_BTM.mean(dim=-1), returns_BT1.squeeze(-1))
    assert targets_BTM.shape[-1] == 5


def test_the_ensemble_is_the_mean_over_heads_and_heads_in_another_order_change_nothing():
    config, at = load_config(), signals()
    turned = dataclasses.replace(at, values_BTNM=at.values_BTNM.flip(2), bootstrap_BNM=at.bootstrap_BNM.flip(1))
    for one, other in zip(distributional_estimate(at, config), distributional_estimate(turned, config), strict=True):
        torch.testing.assert_close(one, other)


def test_crossing_quantiles_are_sorted_before_the_recursion_so_that_the_targets_are_sorted():
    _, targets_BTM = distributional_estimate(signals(num_heads=1), load_config())
    assert (targets_BTM.diff(dim=-1) >= -1e-6).all()


@pytest.mark.parametrize("estimate", [scalar_estimate, distributional_estimate])
def test_critic_lam_moves_the_targets_and_leaves_the_advantages(estimate):
    plain = estimate(signals(), load_config(None, ["advantage.lam=0.9"]))
    apart = estimate(signals(), load_config(None, ["advantage.lam=0.9", "advantage.critic_lam=0.3"]))
    other = estimate(signals(), load_config(None, ["advantage.lam=0.3"]))
    torch.testing.assert_close(apart[0], plain[0])
    torch.testing.assert_close(apart[1], other[1])
    assert not torch.allclose(apart[1], plain[1])


@pytest.mark.parametrize("estimate", [scalar_estimate, distributional_estimate])
def test_the_bootstrap_reaches_the_cut_response_and_no_other(estimate):
    at, config = signals(), load_config()
    bare = estimate(dataclasses.replace(at, bootstrap_BNM=torch.zeros_like(at.bootstrap_BNM)), config)[0]
    moved_B = (estimate(at, config)[0] - bare).abs().amax(dim=-1) > 1e-6
    assert moved_B.tolist() == [False, False, False, True]


@pytest.mark.parametrize("estimate", [scalar_estimate, distributional_estimate])
def test_a_missing_reward_is_not_read_and_leaves_the_critics_opinion_at_the_last_token(estimate):
    at, config = signals(), load_config()
    rewards_BT = at.rewards_BT.clone()
    rewards_BT[2, 2] = torch.nan
    advantages_BT, targets_BTL = estimate(dataclasses.replace(at, rewards_BT=rewards_BT), config)
    torch.testing.assert_close(advantages_BT, estimate(at, config)[0])
    assert advantages_BT[2, 2] == 0
    torch.testing.assert_close(targets_BTL[2, 2].mean(), at.values_BTNM[2, 2].mean())


def test_mixture_targets_have_their_own_number_of_atoms_and_their_seed():
    config = load_config(None, [MEAN, "advantage.target=mixture", "advantage.target_atoms=64"])
    at = signals()
    advantages_BT, targets_BTL = distributional_estimate(at, config)
    assert targets_BTL.shape == (4, 6, 64)
    torch.testing.assert_close(advantages_BT, distributional_estimate(at, load_config(None, [MEAN]))[0])
    assert torch.equal(targets_BTL, distributional_estimate(at, config)[1])
    assert not torch.equal(targets_BTL, distributional_estimate(dataclasses.replace(at, seed=4), config)[1])


# Losses


def test_dvpo_with_every_weight_at_0_is_quantile_regression_and_nothing_else():
    config = load_config(None, OFF)
    given = predictions(3, 32, 32)
    terms = DVPO.critic_loss(*given, config)
    expected_K = quantile_huber_loss(given[0], given[2], quantile_levels(32), config.critic.kappa)
    torch.testing.assert_close(terms["loss"], expected_K)


@pytest.mark.parametrize("term", TERMS)
def test_each_weight_adds_its_own_term_times_itself(term: str):
    given = predictions(3, 32, 32)
    terms = DVPO.critic_loss(*given, load_config(None, [*OFF, f"critic.weights.{term}=0.7"]))
    torch.testing.assert_close(terms["loss"], terms["qr"] + 0.7 * terms[term])
    assert terms[term].abs().max() > 0


def test_tails_against_the_law_change_the_four_terms_that_compare_with_a_return_and_no_other():
    given = predictions(3, 32, 32)
    sample, law = (
        DVPO.critic_loss(*given, load_config(None, ["algorithm=dvpo_paper", f"critic.tail_targets={t}"]))
        for t in ("sample", "law")
    )
    assert list(sample) == list(law)
    changed = {name for name in law if not torch.equal(sample[name], law[name])}
    assert changed == {"loss", "cvar", "gain", "shift", "shape"}
    torch.testing.assert_close(law["loss"], law["qr"] + 0.1 * sum(law[term] for term in TERMS))
    for term, expected in law_tail_terms(given[0], given[2], 0.1, 0.1).items():
        assert torch.equal(law[term], expected)


def test_one_head_one_quantile_and_a_wide_huber_zone_are_half_of_ppos_squared_error_up_to_scale():
    # rho_.5(u) = 1/2 * u^2 / (2 kappa); ppo's loss is u^2 / 2: the ratio is 1 / (2 kappa).
    kappa = 50.0
    given = predictions(1, 1, 1)
    quantile = DVPO.critic_loss(*given, load_config(None, [*OFF, "critic.num_quantiles=1", f"critic.kappa={kappa}"]))
    squared = PPO.critic_loss(*given, load_config(None, ["algorithm=ppo", "critic.value_clip=null"]))
    torch.testing.assert_close(quantile["loss"] * 2 * kappa, squared["loss"])


def test_with_one_head_and_one_quantile_both_rows_estimate_the_same():
    at, config = signals(num_heads=1, num_quantiles=1), load_config(None, [MEAN])
    for one, other in zip(DVPO.estimate(at, config), PPO.estimate(at, config), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["ppo_huber", "ppo_delta_clip"])
def test_the_huber_rows_train_their_critic_by_hubers_loss_of_width_kappa_without_value_clipping(name: str):
    # kappa .5: H(.2) = .2^2 / (2 * .5) = .04 and H(-2) = 2 - .5 / 2 = 1.75; squared errors would be .02 and 2. Before
    # the update both were 1.5: clipped to within .5 of that, the first would be off by 1.
    predictions, targets = torch.tensor([[[0.2]], [[-2.0]]]), torch.zeros(2, 1)
    config = load_config({"algorithm": name}, ["critic.kappa=0.5"])
    terms = ALGORITHMS[name].critic_loss(predictions, torch.full((2, 1, 1), 1.5), targets, config)
    torch.testing.assert_close(terms["loss"], torch.tensor([0.04, 1.75]))


@pytest.mark.parametrize(("levels", "expected"), [("midpoint", 0.5), ("paper", 0.625)])
def test_the_quantiles_are_fitted_at_the_levels_that_the_config_names(levels: str, expected: float):
    # kappa 0, both quantiles 1 below the target: the mean of tau. Midpoint 1/4 and 3/4; the paper's 1/2 and 3/4.
    config = load_config(None, [*OFF, "critic.num_quantiles=2", f"critic.levels={levels}", "critic.kappa=0"])
    theta_KNM = torch.zeros(1, 1, 2)
    assert DVPO.critic_loss(theta_KNM, theta_KNM, torch.ones(1, 1), config)["qr"].item() == pytest.approx(expected)


def test_ppo_clips_the_value_in_units_of_the_reward():
    # v = 1.0, before .2, clip .5 -> clipped to .7; target 0: max(1.0^2, .7^2) / 2 = .5; target 1: max(0, .3^2) / 2.
    value, before, targets = torch.tensor([[[1.0]]] * 2), torch.tensor([[[0.2]]] * 2), torch.tensor([[0.0], [1.0]])
    loss = PPO.critic_loss(value, before, targets, load_config(None, ["algorithm=ppo"]))["loss"]
    torch.testing.assert_close(loss, torch.tensor([0.5, 0.045]))


def test_both_rows_have_ppos_actor_with_its_two_clip_ranges():
    # ratio 2, A 1, clip_high .3 -> -1.3; ratio .5, A -1, clip_low .1 -> .9; ratio 1 -> -A.
    config = load_config(None, ["actor.clip_low=0.1", "actor.clip_high=0.3"])
    log_ratios, advantages = torch.tensor([2.0, 0.5, 1.0]).log(), torch.tensor([1.0, -1.0, 2.0])
    for row in (DVPO, PPO):
        loss, clipped = row.actor_loss(log_ratios, torch.zeros(3), advantages, config)
        torch.testing.assert_close(loss, torch.tensor([-1.3, 0.9, -2.0]))
        assert clipped.tolist() == [True, True, False]


# Finding a row


def test_a_row_of_ones_own_runs_without_a_change_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    config = run_config(tmp_path / "run", "algorithm=own_algorithm:reinforce")
    assert (config.update.minibatches, config.advantage.whiten) == (1, False)
    trainer = Trainer(config, task=Parity())
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    trainer.train()
    assert trainer.critic is None
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters(), strict=True))


def test_the_own_rows_advantage_is_the_return_less_the_batch_mean(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    row = find_algorithm("own_algorithm:reinforce")
    # Returns 1, 0, .5 of the three rewarded responses: their mean is .5.
    advantages_BT, targets_BTL = row.estimate(signals(), load_config())
    torch.testing.assert_close(advantages_BT[:, 0], torch.tensor([0.5, -0.5, 0.0, 0.0]))
    assert (advantages_BT[~signals().mask_BT] == 0).all()
    assert targets_BTL.shape == (4, 6, 0)


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (folder / "own_rows.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_rows", raising=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pppo", "algorithm = pppo is unknown: did you mean ppo?"),
        ("zzz", "the rows are dvpo, ppo"),
        ("no_such_module:row", "cannot be imported (No module named 'no_such_module')"),
        ("own_rows:nothing", "cannot be imported (module 'own_rows' has no attribute 'nothing')"),
        ("own_rows:number", "algorithm = own_rows:number is a int: it must be a dvpo.algorithms.Algorithm"),
        (":row", "algorithm = :row"),
        ("own_rows:", "algorithm = own_rows:"),
    ],
)
def test_a_row_that_cannot_be_found_is_answered_by_one_sentence(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module(tmp_path, monkeypatch, "number = 3\n")
    with pytest.raises(InputError) as caught:
        load_config(None, [f"algorithm={name!r}"])
    assert words in str(caught.value)


def test_a_module_that_fails_while_it_is_imported_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module(tmp_path, monkeypatch, "1 / 0\n")
    with pytest.raises(InputError, match=r"own_rows:row cannot be imported \(.*division by zero\)"):
        find_algorithm("own_rows:row")


def test_a_rows_wrong_defaults_are_found_when_the_config_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module(
        tmp_path,
        monkeypatch,
        "from dataclasses import replace\nfrom dvpo.algorithms import ALGORITHMS\n"
        "row = replace(ALGORITHMS['ppo'], name='mine', defaults={'critic': {'num_head': 1}})\n",
    )
    with pytest.raises(InputError, match=r"critic\.num_head"):
        load_config(None, ["algorithm=own_rows:row"])


def test_a_row_has_a_critic_loss_if_and_only_if_it_has_a_critic():
    for row, change in ((PPO, {"critic_loss": None}), (DVPO, {"critic": "none"})):
        with pytest.raises(InputError, match="if, and only if, it has a critic"):
            dataclasses.replace(row, **change)


def test_every_row_says_where_it_comes_from():
    for name, row in ALGORITHMS.items():
        assert isinstance(row, Algorithm)
        assert row.name == name
        assert row.paper.startswith(("control:", "ours:", "robust Bellman")) or "arXiv" in row.paper
    assert isinstance(load_config(), Config)
