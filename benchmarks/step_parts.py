"""Where the time of a step goes, against the matrix products that it cannot do without.

    OMP_NUM_THREADS=1 python benchmarks/step_parts.py

Columns that went through a trunk are counted by a hook as they pass, a forward with a gradient three times (itself, and
twice its products on the way back). Each column costs 2 FLOPs a weight. The floor is that, divided by what one thread
reaches on large square matrices here. Times are CPU times, medians over the steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contest import circumstances
from reference import make_trainer, write_model
from torch import nn

from dvpo import Trainer
from dvpo.critic_pass import CriticPass
from dvpo.sampling import HuggingFaceSampler
from dvpo.update import Learner

PARTS = {
    "sample": (HuggingFaceSampler, "sample"),
    "values": (CriticPass, "values"),
    "estimate": (Trainer, "estimate"),
    "critic": (Learner, "_update_critic"),
    "policy": (Learner, "_update_actor"),
    "step": (Trainer, "train_step"),
}
"""Innermost first; the time of a part does not count in the parts around it."""


class Meter:
    """CPU seconds and trunk columns of each part of the step in progress."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.columns: dict[str, int] = defaultdict(int)

    def watch(self, kind: type, method: str, part: str) -> None:
        plain = getattr(kind, method)

        def measured(*arguments: Any, **keywords: Any) -> Any:
            self.inside.append(part)
            start = time.process_time()
            try:
                return plain(*arguments, **keywords)
            finally:
                spent = time.process_time() - start
                self.inside.pop()
                self.seconds[part] += spent
                if self.inside:
                    self.seconds[self.inside[-1]] -= spent

        setattr(kind, method, measured)

    def count(self, trunk: nn.Module) -> None:
        def passing(_module: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
            times = 3 if torch.is_grad_enabled() else 1
            self.columns[self.inside[-1]] += times * keywords["input_ids"].numel()

        trunk.register_forward_pre_hook(passing, with_kwargs=True)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    meter = Meter()
    for part, (kind, method) in PARTS.items():
        meter.watch(kind, method, part)
    rate = gemm_rate()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        minibatches = f"update.minibatches={options.minibatches}"
        trainer = make_trainer(options.algorithm, model, Path(folder) / "run", minibatches)
        meter.count(trainer.policy.trunk)
        if trainer.critic is not None:
            meter.count(trainer.critic.trunk)
        steps = [one_step(trainer, meter) for _ in range(2 + options.steps)][2:]
        trainer.close()
    weights = sum(m.weight.numel() for m in trainer.policy.trunk.modules() if isinstance(m, nn.Linear))
    parts = {
        part: {
            "ms": 1e3 * statistics.median(seconds[part] for seconds, _ in steps),
            "columns": steps[0][1][part],
            "floor_ms": 1e3 * 2 * weights * steps[0][1][part] / rate,
        }
        for part in PARTS
    }
    print(f"one thread: {rate / 1e9:.0f} GFLOP/s")
    for part, row in parts.items():
        print(f"{part:10}{row['ms']:9.1f} ms{row['columns']:9} columns   floor {row['floor_ms']:6.1f} ms")
    result = {
        "algorithm": options.algorithm,
        "minibatches": options.minibatches,
        "gemm_flops_per_second": rate,
        "trunk_weights": weights,
        "parts": parts,
        **circumstances(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="dvpo")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after two untimed")
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_parts.json")
    return parser.parse_args()


def one_step(trainer: Trainer, meter: Meter) -> tuple[dict[str, float], dict[str, int]]:
    meter.seconds.clear()
    meter.columns.clear()
    trainer.train_step()
    return defaultdict(float, meter.seconds), defaultdict(int, meter.columns)


def gemm_rate(size: int = 1024) -> float:
    """FLOPs a CPU second of one thread on float32 matrices, the best of ten."""
    a = torch.randn(size, size)
    return max(2 * size**3 / cpu_seconds(lambda: a @ a) for _ in range(10))


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
