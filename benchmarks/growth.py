"""How a training step grows with what it is given: quantiles, heads, length, batch, vocabulary.

    make bench        # or: OMP_NUM_THREADS=1 python benchmarks/growth.py

One of them is varied at a time around the reference step of `benchmarks/reference.py`; DVPO and PPO take turns at every
size, so that what the distribution costs stands beside what the rest does. CPU time, medians over the rounds.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from contest import circumstances, take_turns, timed
from reference import GROUP, make_trainer, write_model

CASES: dict[str, tuple[str, list[int]]] = {
    "quantiles": ("critic.num_quantiles", [16, 64, 200, 512, 1024]),
    "heads": ("critic.num_heads", [1, 2, 4, 8]),
    "completion tokens": ("sampling.max_completion_length", [32, 64, 128, 256]),
    "responses": ("sampling.prompts_per_step", [2, 8, 32]),
    "vocabulary": ("", [99, 1000, 8000, 32000]),
}
"""What is varied -> the setting, and its values; `responses` counts prompts of 8 responses each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns, after one untimed")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            what: [measured(what, value, options.rounds, Path(folder)) for value in CASES[what][1]] for what in CASES
        }
    options.output.write_text(
        json.dumps({"growth": rows, "rounds": options.rounds, **circumstances()}, indent=2) + "\n"
    )


def measured(what: str, value: int, rounds: int, folder: Path) -> dict[str, Any]:
    setting = CASES[what][0]
    place = folder / f"{what}-{value}".replace(" ", "-")
    model = write_model(place / "model", **({} if setting else {"vocabulary": value}))
    overrides = [f"{setting}={value}"] if setting else []
    overrides.append("update.microbatch_size=64")
    trainers = {name: make_trainer(name, model, place / name, *overrides) for name in ("dvpo", "ppo")}
    turns = take_turns({name: timed(trainer.train_step) for name, trainer in trainers.items()}, rounds, untimed=1)
    for trainer in trainers.values():
        trainer.close()
    ms = {name: 1e3 * statistics.median(spent.cpu for spent in turns[name]) for name in trainers}
    ratios = [dvpo.cpu / ppo.cpu for dvpo, ppo in zip(turns["dvpo"], turns["ppo"], strict=True)]
    row = {"value": value * GROUP if what == "responses" else value, "ratio": statistics.median(ratios), "cpu_ms": ms}
    print(
        f"{what:18}{row['value']:7}  dvpo {ms['dvpo']:8.0f} ms   ppo {ms['ppo']:8.0f} ms   {row['ratio']:.3f}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
