"""What our own trainer does with a batch, to hold verl's workers against."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvpo.batch import Rollout
from dvpo.integrations.verl.objective import Objective, make_objective
from dvpo.trainer import Trainer
from runs import LINEAR, Talk, rollout_of, run_config

EPOCHS = 3
ADAM = {"lr": 1.0, "weight_decay": 0.0, "clip_grad": 1.0, "override_optimizer_config": {"eps": 10.0}}
"""`LINEAR` in verl's words."""
CRITIC = {"num_heads": 3, "num_quantiles": 8, "weights": {"risk": 0.3, "cvar": 0.2, "gain": 0.1, "consistency": 0.4}}
TERMS = ("qr", "risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")


@dataclass
class Reference:
    """What our own trainer did with a batch."""

    folder: Path
    """The critic as it was before."""
    rollout: Rollout
    objective: Objective
    values_BT: Tensor
    figures: dict[str, float]
    after: list[Tensor]


def make_reference(folder: Path, run: Path) -> Reference:
    """Two turns a response, the environment's tokens between them, a reward at the end of each turn."""
    settings = {"critic": CRITIC, "advantage": {"critic_lam": 0.7}}
    objective = make_objective(settings, gamma=0.99, lam=0.9)
    overrides = [f"critic.weights.{name}={weight}" for name, weight in CRITIC["weights"].items()]
    overrides += ["advantage.gamma=0.99", "advantage.lam=0.9", "advantage.critic_lam=0.7", "update.minibatches=1"]
    overrides += [f"update.epochs={EPOCHS}", "update.actor_warmup_steps=1", "sampling.prompts_per_step=4", *LINEAR]
    overrides += ["sampling.samples_per_prompt=2", "sampling.max_completion_length=24"]
    trainer = Trainer(run_config(run, *overrides), task=Talk())
    critic = trainer.critic
    assert critic is not None
    torch.manual_seed(5)  # heads that say something: fresh ones are all but equal
    torch.nn.init.normal_(critic.heads.linear.weight, std=0.1)
    critic.trunk.config.architectures = ["Qwen3Model"]
    critic.save(folder)
    trainer.policy.tokenizer.save_pretrained(folder)
    rollout = rollout_of(trainer)
    assert (rollout.turns_BT == 1).any()
    assert ((rollout.rewards_BT != 0).sum(dim=1) == 2).any()
    estimates, _ = trainer.estimate(rollout)
    figures = trainer.update(rollout, estimates)
    trainer.close()
    values_BT = estimates.values_BTNM.mean(dim=(2, 3))
    return Reference(folder, rollout, objective, values_BT, figures, list(critic.parameters()))
