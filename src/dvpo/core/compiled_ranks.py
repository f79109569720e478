"""How often one law beats another, on a CPU, compiled by Numba: what `dvpo.core.risk.rank_advantage` defines."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvpo.core.compiled_loss import QUERIES, count_below
from dvpo.core.compiling import array, compiled, share_out


def rank_advantage(targets_KL: Tensor, atoms_KM: Tensor) -> Tensor:
    """P(G > Z) + P(G = Z)/2 - 1/2 of each row, [K] in the rows' dtype.

    Args:
        targets_KL: atoms of G, ascending along L.
        atoms_KM: atoms of Z, of the same dtype, ascending along M.
    """
    targets, atoms = array(targets_KL), array(atoms_KM)
    result = np.empty(len(targets), targets.dtype)
    share_out(_rank, len(targets), targets, atoms, result)
    return torch.from_numpy(result)


@compiled
def _rank(start: int, stop: int, targets: Any, atoms: Any, result: Any) -> None:
    num_targets, num_atoms = targets.shape[1], atoms.shape[1]
    pairs = num_targets * num_atoms
    block, none = int(QUERIES), atoms.dtype.type(0)
    ours = np.full((num_targets // block + 1) * block, np.inf, targets.dtype)
    theirs = np.full((num_atoms // block + 1) * block, np.inf, atoms.dtype)
    beaten, ahead = np.empty(len(ours), np.int32), np.empty(len(theirs), np.int32)
    for k in range(start, stop):
        for i in range(num_targets):
            ours[i] = targets[k, i]
        for j in range(num_atoms):
            theirs[j] = atoms[k, j]
        count_below(ours, theirs, none, beaten)
        count_below(theirs, ours, none, ahead)
        # What beats an atom or ties with it is all that is not ahead of it: ties count in one of the two sums.
        wins = 0
        for i in range(num_targets):
            wins += beaten[i]
        for j in range(num_atoms):
            wins += num_targets - ahead[j]
        result[k] = wins / (2 * pairs) - 0.5
