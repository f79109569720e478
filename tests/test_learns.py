"""The machinery learns, not only runs: the claim of benchmarks/learns.py, made again from scratch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learns


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_row_gains_five_points_of_true_accuracy_on_four_of_five_seeds_at_either_dial(tmp_path: Path) -> None:
    output = tmp_path / "learns.json"
    subprocess.run([sys.executable, learns.__file__, "--output", str(output)], check=True)
    rows = json.loads(output.read_text())["rows"]
    gained = {(a, d): learns.learnt(rows, a, d) for a in learns.ALGORITHMS for d in learns.DIALS}
    assert min(gained.values()) >= learns.ENOUGH_SEEDS, gained


def test_the_committed_result_shows_the_same_for_every_seed_of_the_grid() -> None:
    rows = json.loads(learns.RESULT.read_text())["rows"]
    grid = {(a, d, s) for a in learns.ALGORITHMS for d in learns.DIALS for s in learns.SEEDS}
    assert {(r["algorithm"], r["checker"], r["seed"]) for r in rows} == grid
    assert min(learns.learnt(rows, a, d) for a in learns.ALGORITHMS for d in learns.DIALS) >= learns.ENOUGH_SEEDS
