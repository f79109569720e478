"""What a distribution costs, as a ratio: a guard against a step that becomes much slower. Figures: docs/speed.md."""

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from contest import ratio, take_turns, upper_bound_of_median
from reference import make_trainer, write_model


def test_a_dvpo_step_takes_less_than_twice_a_ppo_step(tmp_path: Path):
    """CPU time in turns: neither a slow machine nor a busy one shows in the ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = write_model(tmp_path / "model")
    trainers = {name: make_trainer(name, model, tmp_path / name) for name in ("dvpo", "ppo")}

    def turn(name: str) -> float:
        start = time.process_time()
        trainers[name].train_step()
        return time.process_time() - start

    try:
        seconds = take_turns({name: lambda name=name: turn(name) for name in trainers}, rounds=3, untimed=1)
    finally:
        torch.set_num_threads(threads)
        for trainer in trainers.values():
            trainer.close()
    assert statistics.median(a / b for a, b in zip(seconds["dvpo"], seconds["ppo"], strict=True)) < 2.0


def test_the_bound_of_a_median_is_the_order_statistic_that_tables_give():
    # P(Binomial(30, 1/2) <= 19) = .9506: the 20th smallest; of 4 values none will do, 1 - 1/16 < .95.
    assert upper_bound_of_median([float(i) for i in range(1, 31)][::-1]) == 20.0
    assert upper_bound_of_median([1.0, 2.0, 3.0, 4.0]) == float("inf")


def test_turns_alternate_and_the_first_rounds_do_not_count():
    order: list[str] = []

    def contestant(name: str, spent: list[float]):
        return lambda: (order.append(name), spent.pop(0))[1]

    seconds = take_turns({"a": contestant("a", [9.0, 2.0, 3.0]), "b": contestant("b", [9.0, 1.0, 2.0])}, 2, untimed=1)
    assert "".join(order) == "ababab"
    row = ratio(seconds["a"], seconds["b"])
    assert row["median_ratio"] == pytest.approx(1.75)  # of 2 / 1 and 3 / 2, not 2.5 / 1.5
    assert (row["median_ms"], row["of_median_ms"]) == (2500.0, 1500.0)
