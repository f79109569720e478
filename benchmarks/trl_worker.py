"""TRL's GRPOTrainer as a contestant: a process that makes a step whenever it reads a line, and answers what it took.

Runs in an environment of its own (`make bench-trl` makes it) and knows nothing of this project. A turn is everything
from one step to the next: generation, reward, the forward and backward pass, the optimiser's step, logging.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Turns(TrainerCallback):
    """Waits before each step until the other side says go."""

    def __init__(self) -> None:
        self.started: tuple[float, float] | None = None

    def on_step_begin(self, *arguments, **keywords) -> None:
        if self.started is not None:
            wall, cpu = self.started
            answer({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": peak()})
        if not sys.stdin.readline():
            sys.exit()
        self.started = time.perf_counter(), time.process_time()


def answer(row: dict) -> None:
    print(json.dumps(row), file=REPLIES, flush=True)


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def parity(completion_ids, **columns) -> list[float]:
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def main(model: str, work: str) -> None:
    settings = json.loads(Path(work, "settings.json").read_text())
    config = GRPOConfig(
        output_dir=f"{work}/trl",
        per_device_train_batch_size=settings["batch"],
        num_generations=settings["group"],
        max_completion_length=settings["completion"],
        max_steps=1_000_000,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=settings["max_grad_norm"],
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        epsilon=0.2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    prompts = Dataset.from_dict({"prompt": settings["prompts"]})
    trainer = GRPOTrainer(model=model, reward_funcs=parity, args=config, train_dataset=prompts, callbacks=[Turns()])
    trainer.train()


if __name__ == "__main__":
    REPLIES, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(1)
    main(*sys.argv[1:])
