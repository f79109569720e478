"""The method in one file: it does what the library does, and it learns under noise."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvpo.core.losses import clipped_surrogate
from dvpo.core.masks import whiten
from dvpo.core.quantiles import quantile_levels
from dvpo.core.returns import distributional_gae
from dvpo.core.risk import critic_terms
from dvpo.trainer import Trainer
from runs import LINEAR, Parity, farthest, rollout_of, run_config, weights

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def minimal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import dvpo_minimal

    return dvpo_minimal


def test_the_file_is_short_enough_to_be_read_and_imports_nothing_of_ours():
    lines = (EXAMPLES / "dvpo_minimal.py").read_text().splitlines()
    assert len(lines) <= 300
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"copy", "math", "dataclasses", "torch", "transformers"}


def test_advantages_and_targets_are_the_librarys_with_masked_tokens_in_between(minimal):
    torch.manual_seed(0)
    mask_BT = torch.rand(6, 9) < 0.6
    theta_BTM, rewards_BT = torch.randn(6, 9, 5).sort(dim=-1).values, torch.randn(6, 9) * mask_BT
    expected = distributional_gae(rewards_BT, theta_BTM, mask_BT, minimal.GAMMA, minimal.LAM)
    torch.testing.assert_close(minimal.distributional_gae(rewards_BT, theta_BTM, mask_BT), expected)
    torch.testing.assert_close(minimal.whiten(rewards_BT, mask_BT), whiten(rewards_BT, mask_BT))


def test_every_critic_term_and_its_gradient_is_the_librarys(minimal):
    torch.manual_seed(0)
    theta_KNM, targets_KM = torch.randn(40, 3, 20, requires_grad=True), torch.randn(40, 20)
    found = minimal.critic_terms(theta_KNM, targets_KM)
    constants = (minimal.KAPPA, minimal.ETA, minimal.ALPHA, minimal.BETA)
    expected = critic_terms(theta_KNM, targets_KM, quantile_levels(20), *constants)
    assert found.keys() == expected.keys()
    for name, term_K in expected.items():
        torch.testing.assert_close(found[name], term_K, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(term.sum(), theta_KNM, retain_graph=True)[0] for term in (found[name], term_K)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
        assert gradients[1].any(), name


def test_the_clipped_surrogate_is_the_librarys(minimal):
    torch.manual_seed(0)
    given = torch.randn(3, 50).unbind()
    torch.testing.assert_close(
        minimal.clipped_surrogate(*given), clipped_surrogate(*given, minimal.CLIP, minimal.CLIP)[0]
    )


def recorded(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Filled at the optimiser's last step: the clipped gradients that it was given."""
    gradients: list[Tensor] = []

    def record(adamw: torch.optim.Optimizer, *_: object) -> None:
        gradients[:] = [p.grad.clone() for group in adamw.param_groups for p in group["params"]]

    optimiser.register_step_pre_hook(record)
    return gradients


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_update_gives_the_losses_gradients_and_weights_of_the_trainers(minimal, monkeypatch, tmp_path, epochs: int):
    """Losses to 1e-5 of their size, each gradient to 5e-6 and each weight's move to 1e-5 of the module's largest."""
    for name, value in {"EPOCHS": epochs, "HEADS": 3, "QUANTILES": 8}.items():
        monkeypatch.setattr(minimal, name, value)
    terms = ("risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")
    settings = {
        "algorithm": "dvpo_paper",
        "seed": 1,  # at 0 no answer is paid: whitening blows rounding up, tenfold
        "sampling.temperature": 1.0,
        "update.minibatches": 1,
        "update.epochs": epochs,
        "advantage.gamma": minimal.GAMMA,
        "advantage.lam": minimal.LAM,
        "critic.kappa": minimal.KAPPA,
        "critic.eta": minimal.ETA,
        "critic.alpha": minimal.ALPHA,
        "critic.beta": minimal.BETA,
        "actor.clip_low": minimal.CLIP,
        "actor.clip_high": minimal.CLIP,
        **{f"critic.weights.{term}": minimal.TERM_WEIGHT for term in terms},
        **{f"{name}.max_grad_norm": minimal.MAX_GRAD_NORM for name in ("policy_optimiser", "critic_optimiser")},
    }
    overrides = [*LINEAR, *(f"{key}={value}" for key, value in settings.items())]
    trainer = Trainer(run_config(tmp_path / "run", *overrides), task=Parity())
    policy = copy.deepcopy(trainer.policy.model)
    critic = minimal.Critic(trainer.critic.trunk, policy.config.hidden_size)
    critic.heads.load_state_dict(trainer.critic.heads.linear.state_dict())
    start = [p.detach().clone() for p in (*policy.parameters(), *critic.parameters())]
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1.0, eps=10.0, weight_decay=0.0) for m in (policy, critic)]
    found = [recorded(optimiser) for optimiser in optimisers]
    expected = [recorded(o.adamw) for o in (trainer.policy_optimiser, trainer.critic_optimiser)]

    rollout = rollout_of(trainer)
    assert rollout.rewards_BT.unique().numel() > 1
    batch = minimal.Batch(
        rollout.tokens_BS, rollout.attention_BS, rollout.mask_BT, rollout.sampler_logprobs_BT, rollout.rewards_BT
    )
    losses = minimal.update(policy, critic, *optimisers, batch)
    losses_of_trainer: list[float] = []
    for optimiser in (trainer.critic_optimiser, trainer.policy_optimiser):
        step = optimiser.update
        monkeypatch.setattr(
            optimiser, "update", lambda at, loss, step=step: losses_of_trainer.append(loss) or step(at, loss)
        )
    estimates, _ = trainer.estimate(rollout)
    trainer.update(rollout, estimates)

    assert [losses["critic_loss"], losses["policy_loss"]] == pytest.approx(losses_of_trainer[-2:], rel=1e-5, abs=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        assert farthest(mine, theirs) <= 5e-6 * max(float(g.abs().max()) for g in theirs)
    moved = [p.detach() for p in (*policy.parameters(), *critic.parameters())]
    one_digit = 2**-23  # the last of a weight near 1, which the move of .009 is added to
    assert farthest(moved, weights(trainer)) <= 1e-5 * farthest(moved, start) + one_digit
    trainer.close()


@pytest.mark.slow
def test_true_accuracy_rises_under_the_noisy_reward(minimal):
    before, after = minimal.main()
    assert after > before + 0.1
