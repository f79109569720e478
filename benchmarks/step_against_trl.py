"""Our GRPO and DVPO steps against a step of TRL's GRPOTrainer, turn by turn.

    make bench-trl    # makes TRL's environment from pins (requirements/trl.txt), then runs this

Both sides start from the same weights and prompts: 8 prompts of 16 tokens, 8 completions of exactly 32 tokens each, one
optimiser step (AdamW, fused) a step on the whole batch, temperature 1, no KL term, float32, one thread, the same torch
and transformers. TRL's step is everything from one step to the next (generation, reward, forward and backward pass,
optimiser, logging); ours is `Trainer.train_step`, which also judges the truth beside the reward and writes three logs.
DVPO has a critic to train besides, with a trunk of its own: N = 3 heads of M = 200 quantiles.

TRL runs in a process of its own and answers through a pipe; while one side makes a step the other one waits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from contest import Spent, Turn, circumstances, ratio, show, take_turns, timed
from reference import COMPLETION, GROUP, GROUPS, PROMPT, make_trainer, prompts, write_model

HERE = Path(__file__).resolve().parent
OURS = ("grpo", "dvpo")


class TRL:
    """The other process."""

    def __init__(self, python: str, model: Path, work: Path, settings: dict[str, Any]) -> None:
        (work / "settings.json").write_text(json.dumps(settings))
        # Neither our packages nor a network: the worker sees its own environment alone.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, str(HERE / "trl_worker.py"), str(model), str(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(work / "trl.log").open("w"),
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.log, self.peak = work / "trl.log", 0

    def turn(self) -> Spent:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"TRL's process ended:\n{self.log.read_text()[-2000:]}")
        row = json.loads(line)
        self.peak = row["peak"]
        return Spent(row["wall"], row["cpu"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        trainers = {row: make_trainer(row, model, folder / row) for row in OURS}
        settings = trainers["grpo"].config.policy_optimiser
        trl = TRL(
            options.trl_python,
            model,
            folder,
            {
                "batch": GROUPS * GROUP,
                "group": GROUP,
                "completion": COMPLETION,
                "lr": settings.lr,
                "max_grad_norm": settings.max_grad_norm,
                "prompts": prompts(),
            },
        )
        contestants: dict[str, Turn] = {row: timed(trainer.train_step) for row, trainer in trainers.items()}
        turns = take_turns({"trl_grpo": trl.turn, **contestants}, options.pairs)
        trl.close()
        for trainer in trainers.values():
            trainer.close()
    result: dict[str, Any] = {
        "sizes": {"prompt": PROMPT, "completion": COMPLETION, "prompts": GROUPS, "samples": GROUP, "minibatches": 1},
        **{f"{row}_over_trl_grpo": ratio(turns[row], turns["trl_grpo"]) for row in OURS},
        "trl_peak_bytes": trl.peak,
        "trl_environment": frozen(options.trl_python),
        **circumstances(),
    }
    for row in OURS:
        show(f"{row} / TRL GRPO", result[f"{row}_over_trl_grpo"])
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="interpreter of the environment that has TRL")
    parser.add_argument("--pairs", type=int, default=30, help="timed rounds, after two untimed")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "step_trl.json")
    return parser.parse_args()


def frozen(python: str) -> list[str]:
    """The versions that matter there."""
    command = [python, "-m", "pip", "freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line.split("==")[0] in ("torch", "transformers", "trl", "accelerate", "numpy")]


if __name__ == "__main__":
    main()
