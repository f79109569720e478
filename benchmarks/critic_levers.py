"""What do the levers that feed a critic teach it, and what do they cost?

    python benchmarks/critic_levers.py      # 9 settings, one seed, one process, one thread

Only the critic (dvpo's) learns, on clean rewards, by `update.actor_warmup_steps`: every setting sees the very same
responses of one frozen policy, the embedded model with the checker's dial at 1. Writes results/critic_levers.json. One
seed shows what a lever does; it ranks nothing.
"""

import tempfile
import time
from pathlib import Path

from records import Row, record
from rich.console import Console
from rich.table import Table

SEED = 201
STEPS = 12
LAST = 4
RESULT = Path(__file__).parent / "results" / "critic_levers.json"
SETTINGS: dict[str, list[str]] = {
    "none": [],
    "epochs 4": ["critic.epochs=4"],
    "replay 3": ["critic.replay=3"],
    "features": ["critic.features=true"],
    "privileged": ["critic.privileged=answer"],
    "frozen": ["critic.trunk=frozen"],
    "verdict": ["critic.start=verdict"],
    "verdict, first alone": ["critic.start=verdict", "critic.verdict_only_steps=6"],
    "verdict, frozen": ["critic.start=verdict", "critic.trunk=frozen"],
}


def run(setting: str) -> Row:
    """Correlation of V with the true outcome at step 1 and over the last steps; processor seconds a step."""
    from dvpo import Trainer, load_config

    with tempfile.TemporaryDirectory() as folder:
        common = [f"seed={SEED}", f"steps={STEPS}", f"output={folder}/run"]
        alone = [f"update.actor_warmup_steps={STEPS}", "model.checker=1"]
        trainer = Trainer(load_config(None, [*common, *alone, *SETTINGS[setting]]))
        started = time.process_time()
        known = [trainer.train_step()["critic/true_correlation"] for _ in range(STEPS)]
        seconds = (time.process_time() - started) / STEPS
        trainer.close()
    return {
        "setting": setting,
        "first": known[0],
        "last": sum(known[-LAST:]) / LAST,
        "cpu_seconds": seconds,
    }


def show(rows: list[Row]) -> None:
    table = Table(title=f"{STEPS} steps of 128 responses: correlation of V with the truth; processor seconds a step")
    for column in ("lever", "step 1", f"last {LAST} steps", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["setting"], *(f"{row[key]:.2f}" for key in ("first", "last", "cpu_seconds")))
    Console(width=110).print(table)


if __name__ == "__main__":
    record(
        __doc__,
        RESULT,
        {"seed": SEED, "steps": STEPS},
        lambda: [run(setting) for setting in SETTINGS],
        show,
    )
