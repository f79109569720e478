"""Optimiser steps that are not finite: skipped without a trace, counted, and bounded; the experiment in small."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dvpo.skips import Skips

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))
import nonfinite


@pytest.mark.parametrize(("module", "place", "value"), [("critic", "gradient", "nan"), ("actor", "loss", "inf")])
def test_chosen_optimiser_steps_are_skipped_without_a_trace_and_no_other(tmp_path, module, place, value):
    row = nonfinite.skipped(tmp_path / "run", module, place, float(value), steps=3)
    assert (row["optimiser_steps"], row["poisoned"], row["counted"]) == (6, 2, 2)
    assert row["exact"]


def test_a_step_that_is_made_in_spite_of_a_nan_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("dvpo.optimiser.math", SimpleNamespace(isfinite=lambda _: True))
    assert not nonfinite.skipped(tmp_path / "run", "critic", "gradient", float("nan"), steps=2)["exact"]


def test_five_in_a_row_end_the_run_and_leave_the_batch_of_the_fifth(tmp_path):
    row = nonfinite.bounded(tmp_path / "run")
    assert row["exact"]
    assert row["said"].startswith("step 3: the loss or the gradient of the actor was not finite in 5 optimiser steps")
    assert "RUN/skipped-3-actor.safetensors" in row["said"]


def test_a_step_that_is_made_ends_the_row_and_each_module_has_its_own(tmp_path):
    skips = Skips(tmp_path, limit=0)
    for module, moved in [("actor", False), ("critic", False), ("actor", False), ("critic", True)]:
        skips.note(module, moved, 1, None, None, torch.arange(2))
    assert skips.in_a_row == {"actor": 2, "critic": 0}
    assert skips.reason_to_stop is None  # 0: no bound, and no batch written
    again = Skips(tmp_path, limit=0)
    again.load_state_dict(skips.state_dict())
    assert again.in_a_row == skips.in_a_row
