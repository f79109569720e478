"""How functions over rows of numbers are compiled for a CPU by Numba, and run.

Rows know nothing of each other: threads share them out, and no bit changes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Sums may be regrouped, for vector instructions; NaN and infinities keep their meaning."""
    options = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    return njit(**options)(function)


def array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def share_out(kernel: Callable[..., None], count: int, *arguments: Any, least: int = 64) -> None:
    """Run a kernel over all tokens or sequences, on as many threads as torch uses, each with `least` of them."""
    threads = min(torch.get_num_threads(), max(1, count // least))
    if threads == 1:
        kernel(0, count, *arguments)
        return
    cuts = [count * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(lambda i: kernel(cuts[i], cuts[i + 1], *arguments), range(threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dvpo-kernel")


@compiled
def rows_ascend(rows: Any) -> bool:
    for row in rows:
        descents = 0
        for j in range(len(row) - 1):
            descents += not row[j] <= row[j + 1]  # to NaN nothing ascends
        if descents:
            return False
    return True


def ascending(rows: Tensor) -> Tensor:
    """The rows, each sorted; the tensor itself if they are."""
    flat = array(rows).reshape(-1, rows.shape[-1])
    return rows if rows_ascend(flat) else torch.from_numpy(np.sort(flat, axis=-1)).view(rows.shape)


def descents(rows: Tensor) -> Tensor:
    """As `dvpo.core.backends.descents`."""
    flat = array(rows).reshape(-1, rows.shape[-1])
    counts = np.empty(len(flat), np.float32)
    share_out(_descents, len(flat), flat, counts)
    return torch.from_numpy(counts).view(rows.shape[:-1])


@compiled
def _descents(start: int, stop: int, rows: Any, counts: Any) -> None:
    for i in range(start, stop):
        count = 0
        for j in range(rows.shape[1] - 1):
            count += rows[i, j + 1] < rows[i, j]
        counts[i] = count
