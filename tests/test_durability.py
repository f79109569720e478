"""The fault experiments of benchmarks/faults in small: the same code, fewer faults."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))

import damage
import endurance
import kills
import signals


@pytest.mark.slow
def test_killed_at_any_moment_and_after_touches_of_a_save_a_run_ends_as_if_it_had_not_been(tmp_path: Path):
    equal, figures = kills.measure(tmp_path, count=3, in_saves=2, stride=7)
    assert equal
    assert figures["kills"] == 3
    assert figures["touches_of_a_save"] > 2


@pytest.mark.slow
def test_signalled_in_any_phase_a_run_keeps_every_step_in_time_and_ends_the_same(tmp_path: Path):
    passed, figures = signals.measure(tmp_path)
    assert passed, figures


@pytest.mark.slow
def test_a_damaged_checkpoint_is_never_used(tmp_path: Path):
    passed, figures = damage.measure(tmp_path, "critic.json")
    assert passed, figures
    assert figures["damages"] == 6


def test_the_watch_of_a_long_run_sees_memory_and_time(tmp_path: Path):
    _, figures = endurance.measure(tmp_path, 20)
    assert figures["steps"] == 20
    assert all(value > 0 for value in [*figures["resident_mb"], *figures["step_ms"]])


def test_a_growing_run_would_be_seen(tmp_path: Path, monkeypatch):
    sizes = iter(range(1000, 2000, 10))
    monkeypatch.setattr(endurance, "resident", lambda: next(sizes))
    held, figures = endurance.measure(tmp_path, 20)
    assert not held
    assert figures["memory_growth"] > 0.1
