"""verl's synchronous trainer with dvpo's critic: `trainer.v1.trainer_mode=dvpo`."""

from typing import Any

import ray
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from dvpo.errors import InputError
from dvpo.integrations.verl.objective import Objective, make_objective
from dvpo.integrations.verl.worker import CriticLoss, CriticWorker

MODE = "dvpo"


@register_trainer(MODE)
class DvpoTrainer(PPOTrainerSync):
    """What verl does in the mode `sync`, with another critic worker and another critic loss."""

    def __init__(self, config: Any) -> None:
        self.objective = read_objective(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        # verl asks for its modes by name in many places, and this one is `sync` in all of them.
        self.trainer_mode = "sync"
        return super()._build_replay_buffer()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping[Role.Critic] = ray.remote(CriticWorker)

    def _setup(self) -> None:
        super()._setup()
        self.critic_wg.set_loss_fn(CriticLoss(self.objective))


def read_objective(config: Any) -> Objective:
    """The objective that a whole verl config asks for, checked before any worker starts.

    Raises:
        InputError: settings of verl that dvpo's critic cannot follow, or a `dvpo` section that says something wrong.
    """
    needed = {
        "algorithm.adv_estimator": (config.algorithm.adv_estimator, "gae"),
        "critic.strategy": (config.critic.strategy, "fsdp2"),
        "critic.loss_agg_mode": (config.critic.loss_agg_mode, "token-mean"),
    }
    for name, (asked, wanted) in needed.items():
        if asked != wanted:
            raise InputError(f"{name} = {asked}: dvpo's critic needs {wanted}")
    settings = OmegaConf.to_container(config.get("dvpo", {}), resolve=True)
    return make_objective(settings, float(config.algorithm.gamma), float(config.algorithm.lam))
