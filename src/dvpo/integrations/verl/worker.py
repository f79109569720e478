"""verl's critic worker with a memory: what it thought of a batch when it was asked is what its targets are made of."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from dvpo.critic import critic_shape
from dvpo.integrations.verl.engine import MODEL_TYPE, ROW
from dvpo.integrations.verl.objective import Objective, same_rows

IN_PARALLEL = make_nd_compute_dataproto_dispatch_fn(mesh_name="train")


@dataclass(frozen=True)
class CriticLoss:
    """verl's value loss in dvpo's terms: sums over tokens, divided by the tokens of the global mini-batch."""

    objective: Objective

    def __call__(
        self, model_output: dict[str, Tensor], data: Any, dp_group: object = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        mask_K = data["response_mask"].values().bool()
        predictions_KNM, targets_KL = model_output["predictions"][mask_K], model_output["targets"]
        # FSDP takes the mean of the ranks' gradients; the factor makes a sum of it.
        share = data["dp_size"] / max(data["batch_num_tokens"], 1)
        if not len(targets_KL):  # padding rows alone: a stand-in of weight 0, since kernels know no empty batch
            predictions_KNM, targets_KL = model_output["predictions"][:1], targets_KL.new_zeros(1, targets_KL.shape[1])
            share = 0.0
        terms = self.objective.loss(predictions_KNM, targets_KL)
        means = {name: term_K.sum() * share for name, term_K in terms.items()}
        loss = means.pop("loss")
        return loss, Metric.from_dict(means, AggregationType.SUM)


class CriticWorker(TrainingWorker):
    """Trains dvpo's critic on responses that it has just evaluated."""

    def __init__(self, config: TrainingWorkerConfig) -> None:
        super().__init__(replace(config, model_type=MODEL_TYPE))
        self._evaluated: list[Tensor] = []

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_loss_fn(self, loss_fn: Any) -> None:
        """Take verl's own loss, which no one asks for a value, or ours, with what it says about values and targets."""
        super().set_loss_fn(loss_fn)
        if isinstance(loss_fn, CriticLoss):
            folder = self.model_config.local_path
            loss_fn.objective.check_shape(critic_shape(folder), folder)
            self.engine.objective = loss_fn.objective

    @register(dispatch_mode=IN_PARALLEL, blocking=False)
    def infer_batch(self, data: Any) -> Any:
        """The values of a batch, of which the laws are kept."""
        self.engine.ensembles.clear()
        self._evaluated = list(data["input_ids"].unbind())
        data[ROW] = torch.arange(len(data))
        return super().infer_batch(data)

    @register(dispatch_mode=IN_PARALLEL, blocking=False)
    def train_mini_batch(self, data: Any) -> Any:
        """Targets for the whole batch from what was kept, then verl's mini-batches.

        Raises:
            RuntimeError: the batch is not the one that was evaluated last.
        """
        if not same_rows(self._evaluated, data["input_ids"].unbind()):
            raise RuntimeError(
                "the critic is to learn from responses that it has not just evaluated: take trainer_mode=dvpo"
            )
        rewards = data["token_level_rewards"] if "token_level_rewards" in data else data["rm_scores"]
        given = zip(rewards.unbind(), data["response_mask"].unbind(), data["responses"].unbind(), strict=True)
        self.engine.targets = {
            row: self.engine.objective.targets(rewards_T, self.engine.ensembles[row], mask_T, tokens_T)
            for row, (rewards_T, mask_T, tokens_T) in enumerate(given)
        }
        data[ROW] = torch.arange(len(data))
        output = super().train_mini_batch(data)
        self.engine.targets, self._evaluated = {}, []
        return output
