"""What do the paper's terms weigh beside quantile regression, and how far does a critic get in a run?

    python benchmarks/term_weights.py       # 3 settings, 4 variants, one seed, one process, one thread

`dvpo_paper` learns `math` under the noise `heavy` of the noise study (docs/protocol.md), on a tuning seed. At some
steps, mean over their minibatches, for each term its weight (.1) times the norm of its gradient over that of quantile
regression, both with respect to the predictions of all tokens [K, N, M] that the loss sees. Beside it the same critic
with smaller and larger tails, and without any term. One seed shows sizes; it ranks nothing. Writes
results/term_weights.json.
"""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from records import Row, record
from rich.console import Console
from rich.table import Table

SEED = 1
SHOWN = (1, 10, 50)
RESULT = Path(__file__).parent / "results" / "term_weights.json"
CONFIG = """
algorithm: dvpo_paper
task: {name: math}
model: {checker: 1}
noise: {kind: student_t, df: 2, scale: 0.85, then: [{kind: affine, offset_sd: 1.0, scale_sd: 0.5}]}
evaluation: {every: 0}
"""
STUDY = ["critic.trunk=frozen", "critic.start=verdict", "reward.norm=group"]
SETTINGS: dict[str, list[str]] = {
    "nine cells": [
        *STUDY,
        "advantage.recentre=true",
        "policy_optimiser.lr=3e-4",
        "critic_optimiser.lr=1e-4",
    ],
    "one setting": [*STUDY, "advantage.lam=1", "policy_optimiser.lr=1.5e-4", "critic_optimiser.lr=1e-3"],
    "defaults": [],
}
VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "tails of .03": ["critic.alpha=0.03", "critic.beta=0.03"],
    "tails of .2": ["critic.alpha=0.2", "critic.beta=0.2"],
    "no terms": ["algorithm=dvpo_plain"],
}
FIGURES = ("qr", "value_mean", "return_mean", "spread", "true_correlation")


def run(setting: str, variant: str) -> list[Row]:
    """For each step shown: the terms' share of the gradient, and what the critic's metrics say."""
    import torch

    from dvpo import Trainer, algorithms, load_config

    plain, seen = algorithms.critic_terms, list[dict[str, float]]()

    def watched(theta_KNM: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        if theta_KNM.requires_grad:
            leaf = theta_KNM.detach().requires_grad_()
            norms = {
                name: torch.autograd.grad(term_K.sum(), leaf, retain_graph=True)[0].norm().item()
                for name, term_K in plain(leaf, *rest).items()
            }
            seen.append({name: norms[name] / norms["qr"] for name in algorithms.TERMS})
        return plain(theta_KNM, *rest)

    with tempfile.TemporaryDirectory() as folder, patch.object(algorithms, "critic_terms", watched):
        (path := Path(folder, "run.yaml")).write_text(CONFIG)
        common = [f"seed={SEED}", f"steps={SHOWN[-1]}", f"output={folder}/run"]
        config = load_config(path, [*common, *SETTINGS[setting], *VARIANTS[variant]])
        trainer, rows = Trainer(config), []
        for step in range(1, SHOWN[-1] + 1):
            seen.clear()
            metrics = trainer.train_step()
            shares = {
                name: getattr(config.critic.weights, name) * sum(of[name] for of in seen) / len(seen)
                for name in algorithms.TERMS
            }
            figures = {name: metrics[f"critic/{name}"] for name in FIGURES}
            rows.append({"setting": setting, "variant": variant, "step": step, "shares": shares, **figures})
        trainer.close()
    return [row for row in rows if row["step"] in SHOWN]


def show(rows: list[Row]) -> None:
    table = Table(title=f"dvpo_paper, math, heavy, seed {SEED}: weight * |gradient| of a term / |gradient| of qr")
    for column in ("setting", "variant", "step", *rows[0]["shares"], *FIGURES):
        table.add_column(column, justify="right")
    for row in rows:
        values = [*row["shares"].values(), *(row[name] for name in FIGURES)]
        table.add_row(row["setting"], row["variant"], str(row["step"]), *(f"{value:.2f}" for value in values))
    Console(width=180).print(table)


if __name__ == "__main__":
    record(
        __doc__,
        RESULT,
        {"seed": SEED},
        lambda: [row for setting in SETTINGS for variant in VARIANTS for row in run(setting, variant)],
        show,
    )
