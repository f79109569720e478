"""Distributional value modelling for policy optimisation: train language models by RL when rewards are noisy."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvpo.loading import load_config
    from dvpo.trainer import Trainer
    from dvpo.valuation import load_critic

__all__ = ["Trainer", "load_config", "load_critic"]
__version__ = version("dvpo")

_HOMES = {"Trainer": "dvpo.trainer", "load_config": "dvpo.loading", "load_critic": "dvpo.valuation"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a reward function's process imports this package and has no need of torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dvpo' has no attribute {name!r}")
