"""Does injected noise have the promised rates on what the starting policy really writes?

    python benchmarks/reward_noise.py      # 24,000 held-out questions, 4 answers each; some minutes on one core

The embedded math model answers held-out questions. A pair is the first right and the first wrong answer to one
question, so that no answer is in two pairs and every pair has draws of its own: counts are binomial, and the intervals
are Wilson's. Writes results/reward_noise.json.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dvpo import provenance
from dvpo.evaluate import take
from dvpo.noise import make_noise
from dvpo.policy import open_policy
from dvpo.settings import NoiseConfig, SamplingConfig
from dvpo.stats import wilson_interval
from dvpo.tasks import total
from dvpo.tasks.math import ChainArithmetic
from dvpo.warmstart import warm_start

SEED = 301
QUESTIONS = 24_000
SAMPLES = 4
ACCURACY = 0.72
RESULT = Path(__file__).parent / "results" / "reward_noise.json"

Row = dict[str, Any]
Observed = np.ndarray
"""float64 [questions, samples], NaN where missing."""


class Answers:
    """What the starting policy wrote, and what it is truly worth (0 or 1): [questions, samples]."""

    def __init__(self, questions: int, samples: int = SAMPLES, seed: int = SEED) -> None:
        task = ChainArithmetic(train=0, id=questions, ood=0, seed=seed)
        policy = open_policy(warm_start("math", progress=False), torch.device("cpu"))
        settings = SamplingConfig(max_completion_length=28)
        self.episodes, _ = take(policy, task, task.split("id"), settings, samples, seed)
        texts = [e.text for e in self.episodes]
        right = [e.example.columns["answer"] for e in self.episodes]
        self.true = np.array(task.true_reward([], texts, [], answer=right), dtype=float).reshape(questions, samples)

    @property
    def mixed(self) -> np.ndarray:
        """Questions with a right and a wrong answer."""
        return (self.true.max(axis=1) == 1) & (self.true.min(axis=1) == 0)

    def observed(self, seed: int, **settings: Any) -> Observed:
        """The rewards under a noise."""

        seen = make_noise(NoiseConfig(**settings), seed)(
            self.true.ravel().tolist(),
            [e.example.id for e in self.episodes],
            [e.visit for e in self.episodes],
            [e.sample for e in self.episodes],
            [e.tokens for e in self.episodes],
        )
        return np.array([total(reward) for reward in seen]).reshape(self.true.shape)

    def pairs_in_order(self, observed: Observed) -> np.ndarray:
        """Of each mixed question: whether its first right answer is observed above its first wrong one."""
        true, seen = self.true[self.mixed], observed[self.mixed]
        each = np.arange(len(true))
        return seen[each, true.argmax(axis=1)] > seen[each, true.argmin(axis=1)]


def share(promised: float, hits: np.ndarray) -> Row:
    """A promised probability against the share of True."""
    low, high = wilson_interval(int(hits.sum()), hits.size)
    return {"promised": promised, "measured": float(hits.mean()), "low": low, "high": high, "count": int(hits.size)}


def measure(answers: Answers, seed: int = SEED) -> dict[str, Row]:
    """What is promised -> promised and measured rate, its 95% interval, and over how many it was counted."""
    true, wrong, right = answers.true, answers.true == 0, answers.true == 1
    rows = {}
    for kind in ("reward_model", "response_reward_model"):
        observed = answers.observed(seed, kind=kind, accuracy=ACCURACY)
        rows[f"{kind}: pairs in order"] = share(ACCURACY, answers.pairs_in_order(observed))
    for rate in (0.1, 0.4):
        turned = answers.observed(seed, kind="flip", rate=rate) != true
        rows[f"flip {rate}: turned"] = share(rate, turned)
        persistent = answers.observed(seed, kind="persistent", rate=rate) != true
        assert (persistent == persistent[:, :1]).all(), "a prompt's label is wrong for all of its answers or for none"
        rows[f"persistent {rate}: prompts"] = share(rate, persistent[:, 0])
        rows[f"missing {rate}: missing"] = share(rate, np.isnan(answers.observed(seed, kind="missing", rate=rate)))
    turned = answers.observed(seed, kind="asymmetric", false_positive=0.1, false_negative=0.3) != true
    rows["asymmetric: false positives"] = share(0.1, turned[wrong])
    rows["asymmetric: false negatives"] = share(0.3, turned[right])
    spikes = answers.observed(seed, kind="spikes", rate=0.05, sd=10.0) - true
    rows["spikes: hit"] = share(0.05, spikes != 0)
    rows["spikes: beyond one deviation"] = share(math.erfc(1 / math.sqrt(2)), abs(spikes[spikes != 0]) > 10)
    rows["random: taken for right"] = share(0.5, answers.observed(seed, kind="random") == 1)
    return rows


def show(rows: dict[str, Row]) -> None:
    table = Table(title="% of answers, prompts or pairs of the starting policy; 95% intervals")
    for column in ("noise", "promised", "measured", "low", "high", "count"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        figures = (f"{100 * row[key]:.2f}" for key in ("promised", "measured", "low", "high"))
        table.add_row(name, *figures, f"{row['count']:,}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = {
        "commit": provenance.source().commit,
        "machine": provenance.machine("cpu") | {"threads": 1},
        "versions": provenance.versions(),
        "seed": SEED,
        "questions": options.questions,
        "samples": SAMPLES,
    }
    answers = Answers(options.questions)
    rows = measure(answers)
    show(rows)
    result = {**facts, "solved": float(answers.true.mean()), "mixed": int(answers.mixed.sum()), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
