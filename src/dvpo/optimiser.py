"""One optimiser a module: AdamW, its learning-rate schedule, its own gradient clipping."""

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dvpo.config import Config
from dvpo.parallel import add_gradients, shared_like
from dvpo.settings_learning import OptimiserConfig

LARGE, HIGH = 50_000_000, 2e-5
"""A policy of more parameters, which all learn, is hardly ever trained at a higher rate: the literature takes 1e-6."""


def warn_of_rate(model: nn.Module, config: Config) -> None:
    """Of a policy much larger than the embedded one: say that the rate which suits that one does not suit it."""
    size, rate = sum(p.numel() for p in model.parameters()), config.policy_optimiser.lr
    if size > LARGE and rate > HIGH and not config.model.lora.rank:
        warnings.warn(
            f"policy_optimiser.lr = {rate:g} suits the embedded model, and this one has {size / 1e6:,.0f} million "
            "parameters, which all learn: set policy_optimiser.lr=1e-6 critic_optimiser.lr=1e-5",
            stacklevel=2,
        )


class Optimiser:
    """AdamW on the parameters of one module that train.

    Args:
        module: policy or critic; each has an optimiser and a clip norm of its own.
        settings: the config's section.
        steps: training steps of the run, for schedules that end at 0.
    """

    def __init__(self, module: nn.Module, settings: OptimiserConfig, steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,  # one pass over all weights; the default loops over tensors on a CPU
        )

    def update(self, step: int, loss: float = 0.0) -> tuple[float, bool]:
        """Add up all processes' gradients, clip their norm, move the weights by training step `step`'s rate, drop them.

        A loss or a gradient that is not finite leaves weights and optimiser as they were.

        Args:
            step: training step, from 1.
            loss: what the gradient was taken of: it may be NaN where the gradient is not.

        Returns:
            (norm before clipping, whether the weights moved).
        """
        add_gradients(self.parameters)
        size = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm, foreach=True)
        norm = float(size.full_tensor() if isinstance(size, DTensor) else size)
        sound = math.isfinite(norm) and math.isfinite(loss)
        if sound:
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate(self.settings, step, self.steps)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm, sound

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        moments = {
            number: {name: shared_like(value, self.parameters[number]) for name, value in own.items()}
            for number, own in state_dict["state"].items()
        }
        self.adamw.load_state_dict({**state_dict, "state": moments})
        for group in self.adamw.param_groups:  # a resume may change them: the config says them, not the checkpoint
            settings = self.settings
            group |= {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}


def learning_rate(settings: OptimiserConfig, step: int, steps: int) -> float:
    """The rate of training step 1..steps: linear warm-up, then constant, or linear or cosine to 0 behind the last step.

    A pure function of the step, so that a resume has nothing to restore.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    rest = max(steps - step + 1, 0) / max(steps - settings.warmup_steps, 1)
    return settings.lr * (rest if settings.schedule == "linear" else (1 - math.cos(math.pi * rest)) / 2)
