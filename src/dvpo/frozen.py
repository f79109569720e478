"""Weights that never learn are held in the type that they are used in.

Autocast casts the float32 weights of a linear layer at every call (what learns it casts once a pass, and keeps).
Weights that nothing changes may as well be cast once for all: the same results bit for bit, in half the memory for
bfloat16.
Embeddings, norms and whatever is no linear layer stay float32, since autocast leaves them so.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)


def hold_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the linear layers of a model, none of whose weights will learn, in place.

    Args:
        module: a model; a head that shares its weights with the embeddings stays as it is.
        dtype: the compute type; float32 changes nothing.
    """
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
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(dtype)
