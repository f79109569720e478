"""How much of the true policy gradient is left in a step's noisy one? Advantages compared in seconds, without training.

    python benchmarks/advantage_signal.py --task math --noise heavy

At the starting policy, every setting sees the very same responses with the same noise. A critic first learns from some
steps of them, the policy standing still; then each further step's policy gradient is compared with the true one: the
mean over many other steps of the unbiased gradient (return less its group's mean, summed over tokens) of the *true*
rewards.

    one    mean over steps of the cosine between the step's gradient and the true one; with its standard error
    all    cosine between the mean of all steps' gradients and the true one: what is left when noise averages out

The first is what a step moves by; the second shows a bias. It says what an advantage is worth where training begins,
and nothing about where it leads: a critic that can be exploited looks well here. It screens attempts, and proves
nothing: what it put first came last in training (docs/log.md, attempts 7 to 10); a critic's errors do not average out.
Appends rows to results/advantage_signal.jsonl.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dvpo import provenance

if TYPE_CHECKING:
    from torch import Tensor

    from dvpo import Trainer
    from dvpo.batch import Rollout

SEED, TRUE_SEED = 11, 12
WARM, STEPS, TRUE_STEPS = 8, 12, 32
RESULT = Path(__file__).parent / "results" / "advantage_signal.jsonl"
NOISES = {
    "clean": [],
    "heavy": ["noise={kind: student_t, df: 2, scale: 0.85, then: [{kind: affine, offset_sd: 1.0, scale_sd: 0.5}]}"],
    "flip": ["noise={kind: flip, rate: 0.4}"],
    "labels": ["noise={kind: pseudo_labels, path: benchmarks/labels/untrained.jsonl}"],
}
"""Those of the study; `labels` of `dialogue`, where nothing can be voted on, are goals turned persistently."""
TASKS = {
    "math": [],
    "science": ["task={name: science, ood: untrained}"],
    "dialogue": [
        "task={name: dialogue, ood: untrained}", "sampling.prompts_per_step=8", "sampling.samples_per_prompt=4",
    ],
}  # fmt: skip
LEVERS = ["critic.trunk=frozen", "critic.start=verdict"]
LENGTH = {"math": 0.96, "science": 0.96, "dialogue": 0.99}
"""lambda of the settings called "length": 1 - 1 / tokens of a response."""


def ppo(lam: float, rate: str, norm: str = "none", row: str = "ppo", *more: str) -> list[str]:
    """A row with a critic: lambda, the critic's learning rate, how rewards are normalised."""
    given = [f"algorithm={row}", f"advantage.lam={lam:g}", f"critic_optimiser.lr={rate}", f"reward.norm={norm}"]
    return [*given, *more]


SETTINGS: dict[str, list[str]] = {
    "grpo": ["algorithm=grpo"],
    "grpo_rank": ["algorithm=grpo_rank"],
    "dr_grpo": ["algorithm=dr_grpo"],
    "reinforce_pp": ["algorithm=reinforce_pp"],
    "ppo": ppo(1, "1e-3"),
    "ppo lam .95": ppo(0.95, "1e-3"),
    "ppo lam .95 slow": ppo(0.95, "1e-4"),
    "ppo lam .8 slow": ppo(0.8, "1e-4"),
    "ppo group": ppo(1, "1e-3", "group"),
    "ppo group lam .95": ppo(0.95, "1e-3", "group"),
    "dvpo": ppo(1, "1e-3", "none", "dvpo_paper"),
    "dvpo lam .95 slow": ppo(0.95, "1e-4", "none", "dvpo_paper"),
    "rank": ppo(1, "1e-3", "none", "dvpo_rank"),
    "rank group": ppo(1, "1e-3", "group", "dvpo_rank"),
    "rank robust": ppo(1, "1e-3", "group_robust", "dvpo_rank"),
    "rank group lam .95": ppo(0.95, "1e-3", "group", "dvpo_rank"),
    "rank lam .95 slow": ppo(0.95, "1e-4", "none", "dvpo_rank"),
    "denoised": ppo(1, "1e-3", "none", "dvpo_plain", "advantage.law.functional=denoised", "reward.trusted=0.05"),
    "delta clip group": ppo(1, "1e-3", "group", "ppo_delta_clip"),
    "ppo length": ppo(1, "1e-4", "none", "ppo", "advantage.recentre=true"),
    "dvpo length": ppo(1, "1e-4", "none", "dvpo_paper", "advantage.recentre=true"),
    "rank length": ppo(1, "1e-4", "none", "dvpo_rank", "advantage.recentre=true"),
    "delta clip length": ppo(1, "1e-4", "group", "ppo_delta_clip", "advantage.recentre=true"),
    "ppo group length": ppo(1, "1e-4", "group", "ppo", "advantage.recentre=true"),
    "rank group length": ppo(1, "1e-4", "group", "dvpo_rank", "advantage.recentre=true"),
    "ppo group lam .8": ppo(0.8, "1e-4", "group", "ppo", "advantage.recentre=true"),
    "rank group lam .8": ppo(0.8, "1e-4", "group", "dvpo_rank", "advantage.recentre=true"),
    **{
        f"{name} group trust {share}": ppo(
            1, "1e-4", "group", row, "advantage.recentre=true", f"advantage.reward_trust={share}"
        )
        for name, row in {
            "ppo": "ppo",
            "dvpo": "dvpo_paper",
            "rank": "dvpo_rank",
            "delta clip": "ppo_delta_clip",
        }.items()
        for share in (0.5, 0.25, 0.1, 0)
    },
}


def open_trainer(folder: Path, task: str, noise: str, settings: list[str], seed: int) -> "Trainer":
    from dvpo import Trainer, load_config
    from dvpo.algorithms import find_algorithm

    row = next(part.removeprefix("algorithm=") for part in settings if part.startswith("algorithm="))
    alone = [*LEVERS, "update.actor_warmup_steps=1000"] if find_algorithm(row).has_critic else []
    common = [f"seed={seed}", f"output={folder}", "steps=1000"]
    voted = noise == "labels" and task == "dialogue"
    noisy = ["noise={kind: persistent, rate: 0.4}"] if voted else NOISES[noise]
    return Trainer(load_config(None, [*common, *TASKS[task], *noisy, *alone, *settings]))


def gradient(trainer: "Trainer", rollout: "Rollout") -> "Tensor":
    """The policy gradient of one step, flat; nothing is updated."""
    import torch

    from dvpo.core.losses import aggregation_weights
    from dvpo.distributed import all_reduce_sum

    estimates, _ = trainer.estimate(rollout)
    mask_BT = estimates.mask_BT
    length = trainer.config.sampling.max_completion_length
    weights_BT, denominator = aggregation_weights(mask_BT, trainer.config.actor.aggregation, length, all_reduce_sum)
    logprobs_K, _ = trainer._logprobs(trainer.policy, rollout, mask_BT)
    trainer.policy.model.zero_grad()
    ((weights_BT * estimates.advantages_BT)[mask_BT] * logprobs_K).sum().div(denominator).backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters() if p.grad is not None])


def warm(trainer: "Trainer", rollout: "Rollout") -> None:
    """Let the critic learn from a step; the policy stands still."""
    trainer.step += 1
    if trainer.critic_pass is not None:
        trainer.critic_pass.expect(trainer._minibatches(rollout, "rows", trainer.step, 0)[0])
        estimates, _ = trainer.estimate(rollout)
        trainer.update(rollout, estimates)


def run(task: str, noise: str, names: list[str]) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        clean = open_trainer(Path(home) / "true", task, "clean", ["algorithm=dr_grpo"], TRUE_SEED)
        true = torch.stack([gradient(clean, clean.collect()[0]) for _ in range(TRUE_STEPS)]).mean(dim=0)
        clean.close()
        # Each setting estimates its own noise rates and so has to see the responses as they come; they are the same.
        for number, name in enumerate(names):
            started = time.process_time()
            by_length = [f"advantage.lam={LENGTH[task]}"] if name.endswith("length") else []
            trainer = open_trainer(Path(home) / str(number), task, noise, [*SETTINGS[name], *by_length], SEED)
            for _ in range(WARM):
                warm(trainer, trainer.collect()[0])
            gradients = torch.stack([gradient(trainer, trainer.collect()[0]) for _ in range(STEPS)])
            trainer.close()
            one = torch.cosine_similarity(gradients, true.unsqueeze(0), dim=1)
            rows.append(
                {
                    "task": task,
                    "noise": noise,
                    "setting": name,
                    "one": round(one.mean().item(), 4),
                    "one_error": round(one.std().item() / STEPS**0.5, 4),
                    "all": round(torch.cosine_similarity(gradients.mean(dim=0), true, dim=0).item(), 4),
                    "seed": SEED,
                    "warm": WARM,
                    "steps": STEPS,
                    "cpu_seconds": round(time.process_time() - started, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="cosine with the true gradient: of one step (+- standard error), of the mean of all steps")
    for column in ("setting", "one", "all"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in sorted(rows, key=lambda row: -row["one"]):
        table.add_row(row["setting"], f"{row['one']:.3f} +- {row['one_error']:.3f}", f"{row['all']:.3f}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="math")
    parser.add_argument("--noise", choices=list(NOISES), default="heavy")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSONL file, added to")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
    rows = run(options.task, options.noise, options.settings)
    source = {"commit": provenance.source().commit, "machine": provenance.machine("cpu")["cpu"]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as file:
        file.writelines(json.dumps({**row, **source}) + "\n" for row in rows)
    show(rows)


if __name__ == "__main__":
    main()
