"""The machinery learns, not only runs: the claim of benchmarks/learns.py, made again from scratch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dvpo.algorithms import ALGORITHMS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learns


def all_learnt(rows: list[learns.Row]) -> bool:
    """dvpo and ppo on four of five seeds at either dial, every other row on each of its three."""
    gained = {cell: (learns.learnt(runs), len(runs)) for cell, runs in learns.cells(rows).items()}
    return all(won >= min(seeds, 4) for won, seeds in gained.values())


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_row_gains_five_points_of_true_accuracy(tmp_path: Path) -> None:
    output = tmp_path / "learns.json"
    subprocess.run([sys.executable, learns.__file__, "--output", str(output)], check=True)
    assert all_learnt(json.loads(output.read_text())["rows"])


def test_the_committed_result_shows_the_same_for_every_run_of_the_grid() -> None:
    rows = json.loads(learns.RESULT.read_text())["rows"]
    assert sorted((r["algorithm"], r["checker"], r["seed"]) for r in rows) == sorted(learns.grid())
    assert all_learnt(rows)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_has_a_page_that_shows_the_committed_result(name: str) -> None:
    result = json.loads(learns.RESULT.read_text())
    assert learns.block(result, name) in (learns.PAGES / f"{name}.md").read_text()
