"""What sampling by transformers spares: rows that are over are dropped, and contexts of similar length share a batch.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py

Four ways take turns on one thread, on the same weights, contexts and seeds: `plain` (no row is dropped, contexts as
they come), `half` (dropped once half of a batch is over), `drop` (once a quarter is), and `drop and sort`, which is
what the package does. That all of them draw the same tokens is checked. Ratios of CPU time to `plain`, with their upper
95% bound.

`even`: 64 contexts of 16 tokens, up to 448 tokens after them. `ragged`: 256 contexts of 16 to 256 tokens, 8 for each of
32 prompts, up to 96 tokens, in batches of 64. Reference model of 616,576 parameters; a response ends at one letter of
99.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contest import Spent, circumstances, ratio, show, take_turns, timed
from reference import write_model

from dvpo.policy import Policy, open_policy
from dvpo.sampling import HuggingFaceSampler, Turn
from dvpo.settings import SamplingConfig

HERE = Path(__file__).resolve().parent
END = 7


class Plain(HuggingFaceSampler):
    """No row is dropped before the last one is over, and contexts stay as they come."""

    going_on_share = 0.0

    def _order(self, contexts: Sequence[Sequence[int]]) -> list[int]:
        return list(range(len(contexts)))


class Half(Plain):
    going_on_share = 0.5


class Drop(Plain):
    going_on_share = HuggingFaceSampler.going_on_share


WAYS = {"half": Half, "drop": Drop, "drop and sort": HuggingFaceSampler, "plain": Plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds, after one untimed")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "sampling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = open_policy(write_model(Path(folder) / "model"), torch.device("cpu"))
    policy.model.generation_config.eos_token_id = [END]
    result = {name: compare(policy, case, options.rounds) for name, case in cases().items()}
    for name, rows in result.items():
        for way, row in rows.items():
            show(f"{name}, {way} / plain", row)
    options.output.write_text(json.dumps({**result, **circumstances()}, indent=2) + "\n")


def cases() -> dict[str, tuple[list[list[int]], int, int]]:
    """Contexts, budget, batch size."""
    lengths = torch.randint(16, 257, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "even": ([[10 + i // 8] * 16 for i in range(64)], 448, 64),
        "ragged": ([[10 + i] * length for i, length in enumerate(lengths) for _ in range(8)], 96, 64),
    }


def compare(policy: Policy, case: tuple[list[list[int]], int, int], rounds: int) -> dict[str, Any]:
    contexts, budget, size = case
    samplers = {name: way(policy, SamplingConfig(batch_size=size)) for name, way in WAYS.items()}

    def draw(name: str) -> list[Turn]:
        return samplers[name].sample(contexts, [budget] * len(contexts), range(len(contexts)))

    expected = [turn.tokens for turn in draw("plain")]
    for name in WAYS:
        assert [turn.tokens for turn in draw(name)] == expected, name
    forms = {name: timed(lambda name=name: draw(name)) for name in WAYS}
    turns: dict[str, list[Spent]] = take_turns(forms, rounds, untimed=1)
    return {name: ratio(turns[name], turns["plain"]) for name in WAYS if name != "plain"}


if __name__ == "__main__":
    main()
