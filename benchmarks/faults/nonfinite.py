"""NaN and infinity in gradients and losses at chosen optimiser steps: skipped, nothing touched, counted, and bounded.

    python benchmarks/faults/nonfinite.py

Runs of both rows of a run's update, critic and actor. Before a chosen optimiser step a gradient entry, or the loss
alone, is made non-finite. Weights and all of AdamW's state must be the same bits before and after it, every other step
must move the weights, and `skipped_updates` must count exactly. Then five in a row end a run at its bound of five, and
the batch that it leaves must be the one of the last of them, bit for bit.
"""

import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from outcome import conclude
from safetensors.torch import load_file

from dvpo.errors import RunStoppedError
from dvpo.optimiser import Optimiser
from dvpo.runlog import read_rows
from dvpo.trainer import Trainer
from runs import Parity, run_config

STEPS, CHOSEN, BOUND = 20, (3, 4, 11, 17, 30), 5
"""Optimiser steps of a module, of which a training step makes two."""
POISONS = {"gradient": (math.nan, math.inf, -math.inf), "loss": (math.nan, math.inf)}


class Poisoned(Trainer):
    """Makes chosen optimiser steps of a module non-finite, and looks what becomes of weights and moments."""

    module, place, value = "actor", "gradient", math.nan
    chosen: tuple[int, ...] = CHOSEN

    def _step(self, optimiser: Optimiser, name: str, loss: torch.Tensor, *rest: Any) -> bool:
        if name != self.module:
            return super()._step(optimiser, name, loss, *rest)
        self.seen = getattr(self, "seen", 0) + 1
        poisoned = self.seen in self.chosen
        before = state(optimiser)
        if poisoned and self.place == "loss":
            loss = torch.full_like(loss, self.value)
        elif poisoned:
            with_gradient = [p for p in optimiser.parameters if p.grad is not None]
            with_gradient[len(with_gradient) // 2].grad.view(-1)[0] = self.value  # type: ignore[union-attr]
        moved = super()._step(optimiser, name, loss, *rest)
        self.outcomes = [*getattr(self, "outcomes", []), (poisoned, moved, same(before, state(optimiser)))]
        return moved


def state(optimiser: Optimiser) -> list[torch.Tensor]:
    """Every weight, and every tensor that AdamW keeps of it."""
    moments = [v for kept in optimiser.adamw.state.values() for v in kept.values() if isinstance(v, torch.Tensor)]
    return [copy.deepcopy(tensor.detach()) for tensor in (*optimiser.parameters, *moments)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def skipped(folder: Path, module: str, place: str, value: float, steps: int = STEPS) -> dict[str, Any]:
    """A run with poisoned optimiser steps; were these, and no others, skipped without a trace?"""
    trainer = Poisoned(run_config(folder, f"steps={steps}"), task=Parity())
    trainer.module, trainer.place, trainer.value = module, place, value
    trainer.train()
    shares = [row.get(f"{module}/skipped_updates") for row in read_rows(folder / "metrics.jsonl")]
    counted = round(2 * sum(share for share in shares if share))
    chosen = sum(place <= 2 * steps for place in CHOSEN)
    exact = counted == chosen and all(
        (moved, untouched) == (not poisoned, poisoned) for poisoned, moved, untouched in trainer.outcomes
    )
    sound = all(bool(p.isfinite().all()) for p in trainer.policy.model.parameters())
    return {
        "module": module,
        "place": place,
        "value": str(value),
        "optimiser_steps": len(trainer.outcomes),
        "poisoned": chosen,
        "counted": counted,
        "exact": exact and sound,
    }


class Bounded(Poisoned):
    """Remembers the batch of the last poisoned optimiser step."""

    chosen = tuple(range(2, 100))

    def _update_actor(self, rollout: Any, estimates: Any, rows: torch.Tensor, means: Any) -> None:
        if self.skips.reason_to_stop is None:
            self.last = rollout.select(rows), estimates.advantages_BT[rows]
        super()._update_actor(rollout, estimates, rows, means)


def bounded(folder: Path) -> dict[str, Any]:
    """A run whose actor is poisoned from its second optimiser step on: where does it stop, and what does it leave?"""
    trainer = Bounded(run_config(folder, f"steps={STEPS}", f"update.max_skipped={BOUND}"), task=Parity())
    try:
        trainer.train()
        said = "nothing: the run went on"
    except RunStoppedError as error:
        said = str(error).replace(str(folder), "RUN")
    # Poisoned are the optimiser steps 2 to 6: the fifth in a row is the second of training step 3.
    saved = load_file(folder / "skipped-3-actor.safetensors")
    facts = json.loads((folder / "skipped-3-actor.json").read_text())
    rollout, advantages_BT = trainer.last
    exact = (
        trainer.step == 3
        and torch.equal(saved["tokens_BS"], rollout.tokens_BS)
        and torch.equal(saved["sampler_logprobs_BT"], rollout.sampler_logprobs_BT)
        and torch.equal(saved["estimates.advantages_BT"], advantages_BT)
        and facts["prompt_ids"] == list(rollout.prompt_ids)
        and (folder / "checkpoint-3").is_dir()
    )
    return {"bound": BOUND, "stopped_at_step": trainer.step, "said": said, "exact": exact}


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            skipped(Path(folder) / f"{module}-{place}-{value}", module, place, value)
            for module in ("critic", "actor")
            for place, values in POISONS.items()
            for value in values
        ]
        stopped = bounded(Path(folder) / "bounded")
    passed = stopped["exact"] and all(row["exact"] for row in rows)
    conclude("nonfinite", began, passed, {"runs": rows, "bounded": stopped})


if __name__ == "__main__":
    main()
