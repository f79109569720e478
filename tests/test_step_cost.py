"""What a distribution costs, as a ratio: a guard against a step that becomes much slower. Figures: docs/speed.md."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent / "core"))
from contest import Spent, ratio, take_turns, timed, upper_bound_of_median
from naive import looped_gae
from reference import make_trainer, write_model

from dvpo.core.returns import distributional_gae

FORMS = {"loop": looped_gae, "scan": distributional_gae}


def test_a_dvpo_step_takes_little_more_than_a_ppo_step(tmp_path: Path):
    """CPU time in turns: neither a slow machine nor a busy one shows in the ratio, which is 1.1 at most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = write_model(tmp_path / "model")
    trainers = {name: make_trainer(name, model, tmp_path / name) for name in ("dvpo", "ppo")}

    try:
        turns = take_turns({name: timed(trainer.train_step) for name, trainer in trainers.items()}, rounds=3, untimed=1)
    finally:
        torch.set_num_threads(threads)
        for trainer in trainers.values():
            trainer.close()
    assert ratio(turns["dvpo"], turns["ppo"])["cpu"]["median_ratio"] < 1.4


def test_distributional_gae_beats_the_loop_over_tokens_by_a_wide_margin():
    # 18 times for 8 sequences of 512 tokens (benchmarks/gae.py).
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(8, 512, generator=generator), torch.randn(8, 512, 200, generator=generator))
    given += (torch.ones(8, 512, dtype=torch.bool), 1.0, 0.95)
    turns = take_turns({name: timed(partial(form, *given)) for name, form in FORMS.items()}, rounds=5, untimed=1)
    assert ratio(turns["loop"], turns["scan"])["cpu"]["median_ratio"] > 5


def test_the_bound_of_a_median_is_the_order_statistic_that_tables_give():
    # P(Binomial(30, 1/2) <= 19) = .9506: the 20th smallest; of 4 values none will do, 1 - 1/16 < .95.
    assert upper_bound_of_median([float(i) for i in range(1, 31)][::-1]) == 20.0
    assert upper_bound_of_median([1.0, 2.0, 3.0, 4.0]) is None


def test_turns_alternate_and_the_first_rounds_do_not_count():
    order: list[str] = []

    def contestant(name: str, spent: list[float]):
        return lambda: (order.append(name), Spent(s := spent.pop(0), s / 10))[1]

    turns = take_turns({"a": contestant("a", [9.0, 2.0, 3.0]), "b": contestant("b", [9.0, 1.0, 2.0])}, 2, untimed=1)
    assert "".join(order) == "ababab"
    by_clock = ratio(turns["a"], turns["b"])
    assert by_clock["wall"]["median_ratio"] == pytest.approx(1.75)  # of 2 / 1 and 3 / 2, not 2.5 / 1.5
    assert (by_clock["wall"]["median_ms"], by_clock["wall"]["of_median_ms"]) == (2500.0, 1500.0)
    assert by_clock["cpu"]["median_ms"] == pytest.approx(250.0)
