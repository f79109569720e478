"""Optimiser steps that a NaN or an infinity would have made: skipped, counted, and a reason to stop when too many."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dvpo.batch import Estimates, Rollout
from dvpo.distributed import rank
from dvpo.durable import write_atomically


class Skips:
    """Counts each module's skipped steps in a row, and keeps the batch of the one that is one too many.

    Args:
        folder: the run's folder; the batch goes to `skipped-<step>-<module>.safetensors` and `.json` there.
        limit: so many in a row are a reason to stop; 0: there is never one.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.in_a_row: dict[str, int] = {}
        self.reason_to_stop: str | None = None

    def note(self, module: str, moved: bool, step: int, rollout: Rollout, estimates: Estimates, rows: Tensor) -> None:
        """Whether a module's optimiser step was made, and the rows of the batch that it was to be made of."""
        self.in_a_row[module] = 0 if moved else self.in_a_row.get(module, 0) + 1
        if 0 < self.limit <= self.in_a_row[module] and self.reason_to_stop is None:
            whose = f"-{rank()}" if rank() else ""  # every process keeps its share of the batch
            path = self.folder / f"skipped-{step}-{module}{whose}.safetensors"
            facts = {"step": step, "module": module, "skipped_in_a_row": self.limit}
            _write_batch(path, facts, rollout, estimates, rows)
            self.reason_to_stop = (
                f"the loss or the gradient of the {module} was not finite in {self.limit} optimiser steps in a row, as "
                f"many as update.max_skipped allows; the batch of the last one is {path}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.in_a_row = dict(state["in_a_row"])


def _write_batch(path: Path, facts: dict[str, Any], rollout: Rollout, estimates: Estimates, rows: Tensor) -> None:
    """The tensors under the names of their fields, and beside them what is no tensor."""
    chosen = rollout.select(rows)
    values = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    values |= {f"estimates.{field.name}": getattr(estimates, field.name)[rows] for field in fields(estimates)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    write_atomically(path, [save(tensors)])
    write_atomically(path.with_suffix(".json"), [json.dumps({**facts, **rest}, indent=1).encode() + b"\n"])
