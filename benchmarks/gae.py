"""How much faster is distributional GAE as a scan than token by token, and how far is it from the floor?

`dvpo.core.returns.distributional_gae`, the loop over tokens that the tests use as the reference, and the floor: what
any form must do, which is to read the quantiles and to write advantages and targets into fresh memory. They take
turns on one thread; every ratio is the median over the rounds, with a 95% bootstrap interval. `targets` is
`distributional_targets`, the targets alone, and `in place` the same written over the quantiles, as a training step
does.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import exponent, medians, ratios, spread, take_turns

from dvpo.core.returns import distributional_gae, distributional_targets
from dvpo.heap import keep_freed_memory
from dvpo.provenance import machine, source, versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "core"))
from naive import looped_gae  # noqa: E402

GAMMA, LAM = 1.0, 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--quantiles", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gae.json")
    parser.add_argument("--keep-freed", action="store_true", help="for all of them, as a training process does")
    options = parser.parse_args()
    if options.keep_freed:
        keep_freed_memory()
    torch.set_num_threads(1)
    sizes = (options.sequences, options.tokens, options.quantiles)
    cases = {"full": inputs(*sizes, lengths=(1.0, 1.0)), "padded, two turns": inputs(*sizes, lengths=(0.3, 1.0))}
    results = {name: compare(given, options.rounds) for name, given in cases.items()}
    lengths = [64, 256, 1024, 4096, 8192]
    growth = grow(lengths, options.rounds)
    here = source()
    result = {
        "sizes": dict(zip(("sequences", "tokens", "quantiles"), sizes, strict=True)),
        "cases": results,
        "growth": {"tokens": lengths, **growth},
        "machine": machine("cpu"),
        "load_average": os.getloadavg()[0],  # above the number of cores, others were running too
        "versions": versions(),
        "commit": here.commit,
        "dirty": here.dirty,
    }
    for name, case in results.items():
        show(name, case)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def inputs(sequences: int, tokens: int, quantiles: int, lengths: tuple[float, float]) -> tuple[Any, ...]:
    """Lengths between two shares of `tokens`; of a shorter sequence, a tenth in its middle is a user's turn."""
    generator = torch.Generator().manual_seed(0)
    low, high = (int(share * tokens) for share in lengths)
    length_B1 = torch.randint(low, high + 1, (sequences, 1), generator=generator)
    position_T = torch.arange(tokens)
    middle_BT = (position_T >= 0.45 * length_B1) & (position_T < 0.55 * length_B1) & (length_B1 < tokens)
    mask_BT = (position_T < length_B1) & ~middle_BT
    rewards_BT = torch.randn(sequences, tokens, generator=generator) * mask_BT
    quantiles_BTM = torch.randn(sequences, tokens, quantiles, generator=generator)
    return rewards_BT, quantiles_BTM, mask_BT, GAMMA, LAM


def floor(rewards_BT: Tensor, quantiles_BTM: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Both outputs written once, from one reading of the input each."""
    return quantiles_BTM.clone(), quantiles_BTM.clone()


def compare(given: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    functions = {"scan": distributional_gae, "loop": looped_gae, "targets": distributional_targets, "floor": floor}
    forms = {name: lambda function=function: function(*given) for name, function in functions.items()}
    rewards_BT, quantiles_BTM, *rest = given
    own_BTM = quantiles_BTM.clone()
    forms["in place"] = lambda: distributional_targets(rewards_BT, own_BTM, *rest, out=own_BTM)
    seconds = take_turns(forms, rounds, {})
    against = {"scan": "loop", "targets": "loop", "in place": "loop", "floor": "scan"}
    return {
        "ratios": {
            clock: {f"{slow} / {fast}": ratios(turns[slow], turns[fast]) for fast, slow in against.items()}
            for clock, turns in seconds.items()
        },
        "median_seconds": medians(seconds),
        "seconds": seconds,
    }


def grow(lengths: list[int], rounds: int) -> dict[str, Any]:
    """Targets in place for sequences of these lengths, 8 x 200 quantiles; the exponent is a slope on log scales."""
    given = [inputs(8, length, 200, lengths=(1.0, 1.0)) for length in lengths]
    forms = {str(len(x[0][0])): lambda x=x: distributional_targets(*x, out=x[1]) for x in given}
    turns = take_turns(forms, rounds, {"64": 64, "256": 16, "1024": 4})["cpu"]
    slopes = [exponent(lengths, list(round_)) for round_ in zip(*turns.values(), strict=True)]
    row = {"median_cpu_seconds": [statistics.median(turn) for turn in turns.values()], "exponent": spread(slopes)}
    print(f"grows with tokens to the power {row['exponent']['median']:.2f}")
    return row


def show(name: str, case: dict[str, Any]) -> None:
    print(name)
    for clock, seconds in case["median_seconds"].items():
        print(f"  {clock:5}" + "".join(f"{form:>10}{1e3 * second:9.1f} ms" for form, second in seconds.items()))
        for pair, ratio in case["ratios"][clock].items():
            print(f"        {pair:16}{ratio['median']:7.1f}  (95% {ratio['low']:.1f} to {ratio['high']:.1f})")


if __name__ == "__main__":
    main()
