"""Activations computed again in the backward pass instead of kept; transformers renamed both calls within its fifth."""

from typing import Any


def recompute(model: Any) -> None:
    """Keep the inputs of each layer alone, and run it once more where its gradient is wanted."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def recomputes(model: Any) -> bool:
    """Whether it does so while it trains; a module that is none of transformers' does not."""
    if hasattr(model, "is_activation_checkpointing"):
        return bool(model.is_activation_checkpointing)
    return bool(getattr(model, "is_gradient_checkpointing", False))
