"""A sharded policy, whole for as long as it is sampled from."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dvpo.parallel import gathered
from dvpo.policy import Policy


class WholeCopy:
    """A plain copy of a policy's model, filled while it is needed: to sample from, where each process goes its own way.

    Args:
        policy: before it is sharded; its parameters are not copied yet.
        device: where the copy computes.
    """

    def __init__(self, policy: Policy, device: torch.device) -> None:
        empty = {id(p): nn.Parameter(torch.empty(0, device=device), False) for p in policy.model.parameters()}
        model = copy.deepcopy(policy.model, empty).to(device).eval()
        self.policy, self._sharded = replace(policy, model=model), policy.model

    @contextmanager
    def filled(self) -> Iterator[Policy]:
        """The policy as it is now, in its compute type; every process must come here."""
        parameters = dict(self.policy.model.named_parameters())
        try:
            with torch.no_grad():
                for name, parameter in self._sharded.named_parameters():
                    # First moved and cast, then gathered: fewer bytes, and none of them between host memories.
                    share = parameter.to(parameters[name].device, self.policy.dtype)
                    parameters[name].data = gathered(share) if isinstance(share, DTensor) else share
            yield self.policy
        finally:
            for parameter in parameters.values():
                parameter.data = torch.empty(0, device=parameter.device)
