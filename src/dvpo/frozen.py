"""Weights that never learn are held in the type that they are used in.

Autocast casts the float32 weights of a linear layer at every call; of weights that learn it keeps the cast for as long
as it is on, of others it does not. What nothing changes may as well be cast once for all: a forward pass is the same
bit for bit, from half the memory in bfloat16. Embeddings, a head that shares their weights, norms and whatever is no
linear layer (experts in one tensor, say) stay float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)


def hold_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Freeze a model and cast its linear layers, in place.

    Args:
        module: a model; a head that shares its weights with the embeddings stays as it is.
        dtype: the compute type; float32 casts nothing.
    """
    module.requires_grad_(False)
    if dtype is torch.float32:
        return
    others: set[int] = set()
    linear: list[Any] = []
    for part in module.modules():
        if type(part) in LINEAR:  # a subclass may do with its weights what it likes
            linear.append(part)
        else:
            others.update(id(p) for p in part.parameters(recurse=False))
    for part in linear:
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in others:
                parameter.data = parameter.data.to(dtype)


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as checkpoints hold it; what had to be cast lies on the CPU."""
    return {name: tensor.cpu().float() if tensor.dtype is torch.bfloat16 else tensor for name, tensor in state.items()}
