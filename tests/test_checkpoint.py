"""Checkpoints: exact round trips, exact continuation, and a crash at every step that touches the disk."""

import errno
import json
import math
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dvpo import durable
from dvpo.checkpoint import (
    Checkpointer,
    RNGState,
    checkpoint_step,
    find_fault,
    latest_checkpoint,
    load_state,
    restore,
    state_of,
)
from dvpo.durable import DiskFullError
from dvpo.errors import InputError


def write_policy(value: float) -> Callable[[Path], None]:
    """A writer like `save_pretrained`: it makes its folder and leaves more than one file."""

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file({"weight": torch.full((8,), value)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"value": value}))

    return write


def save(checkpointer: Checkpointer, step: int) -> Path:
    return checkpointer.save(step, {"policy": write_policy(step)}, {"data": {"cursor": step}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def equal(left: object, right: object) -> bool:
    """Equality that also compares types, key order, tensor bits and NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor | np.ndarray):
        bits = (left.numpy(), right.numpy()) if isinstance(left, torch.Tensor) else (left, right)
        return (
            bits[0].dtype == bits[1].dtype and bits[0].shape == bits[1].shape and bits[0].tobytes() == bits[1].tobytes()
        )
    if isinstance(left, dict):
        return equal(list(left), list(right)) and equal(list(left.values()), list(right.values()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)


# --- round trips -------------------------------------------------------------------------------


def test_every_kind_of_state_comes_back_exactly(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    state = {
        "plain": [None, True, False, 0, -1, 2**70, "ü\n", "", 0.1, -0.0, 5e-324, 1e300],
        "not in JSON": [math.inf, -math.inf, math.nan, (), (1, (2.5, None)), b"", b"\x00\xff", {}, []],
        "keys": {0: "int", "0": "str", (1, "a"): "tuple", None: "none", True: "bool"},
        "looks like a tag": [{"tuple": [1]}, {"float": "inf"}, {"dict": {}}, {"tensor": "x"}],
        "tensors": [
            base,
            base.T,
            base[0],
            torch.tensor(3),
            torch.zeros(0, 2),
            torch.tensor([math.nan, -0.0]),
        ],
        "types": [torch.ones(2, dtype=dtype) for dtype in (torch.uint8, torch.bool, torch.float64, torch.int64)],
        "clash": {1: torch.tensor(1.0), "1": torch.tensor(2.0)},
        "arrays": [np.arange(3, dtype=np.uint32), np.float64([[1.5]]).T, np.zeros(0)],
    }
    checkpoint = Checkpointer(tmp_path).save(1, {}, state)
    loaded = load_state(checkpoint)
    assert equal(loaded, {**state, "tensors": [tensor.contiguous() for tensor in state["tensors"]]})


def test_bfloat16_tensors_come_back_exactly(tmp_path: Path) -> None:
    tensor = torch.randn(5).bfloat16()
    loaded = load_state(Checkpointer(tmp_path).save(1, {}, {"x": tensor}))["x"]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.view(torch.int16), tensor.view(torch.int16))


def test_an_object_that_would_need_pickle_is_refused_by_its_path_and_nothing_is_left(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(TypeError, match=r"/data/seen/0 is a set"):
        checkpointer.save(1, {}, {"data": {"seen": [{1}]}})
    assert names(tmp_path) == []


def test_all_generators_continue_with_the_same_numbers(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item()]

    draw()  # an odd number of Gaussian draws leaves a cached second one, which is state as well
    checkpoint = Checkpointer(tmp_path).save(1, {}, state_of({"rng": RNGState()}))
    expected = [draw(), draw()]
    restore({"rng": RNGState()}, load_state(checkpoint))
    assert [draw(), draw()] == expected


def test_other_parts_than_the_checkpoint_holds_are_refused() -> None:
    with pytest.raises(InputError, match="resume with the config that wrote it"):
        restore({"rng": RNGState()}, {"rng": RNGState().state_dict(), "optimiser.critic": {}})


class Training:
    """A small model with dropout, AdamW and a schedule: everything that must continue exactly."""

    def __init__(self) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.05, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, T_max=20)
        self.parts = {"optimiser": self.optimiser, "schedule": self.schedule, "rng": RNGState()}

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (self.model(torch.randn(16, 4)) - 1).square().mean()
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def save_model(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.model.state_dict(), folder / "model.safetensors")

    def resume(self, checkpoint: Path, parts: tuple[str, ...] = ("optimiser", "schedule", "rng")) -> None:
        self.model.load_state_dict(load_file(checkpoint / "policy" / "model.safetensors"))
        state = load_state(checkpoint)
        restore({name: self.parts[name] for name in parts}, {name: state[name] for name in parts})


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Path, list[float], dict[str, torch.Tensor]]:
    """A checkpoint after 5 steps, with the losses and weights of the 5 uninterrupted steps that followed."""
    torch.manual_seed(0)
    training = Training()
    training.run(5)
    checkpoint = Checkpointer(tmp_path).save(5, {"policy": training.save_model}, state_of(training.parts))
    losses = training.run(5)
    return checkpoint, losses, training.model.state_dict()


def test_a_resumed_training_continues_bit_for_bit(interrupted) -> None:
    checkpoint, losses, weights = interrupted
    torch.manual_seed(123)
    resumed = Training()
    resumed.resume(checkpoint)
    assert resumed.run(5) == losses
    assert equal(dict(resumed.model.state_dict()), dict(weights))


@pytest.mark.parametrize("forgotten", ["optimiser", "schedule", "rng"])
def test_forgetting_any_part_would_fail_the_continuation_test(interrupted, forgotten: str) -> None:
    checkpoint, losses, _ = interrupted
    torch.manual_seed(123)
    resumed = Training()
    resumed.resume(checkpoint, tuple(name for name in resumed.parts if name != forgotten))
    assert resumed.run(5) != losses


# --- damage ------------------------------------------------------------------------------------

FILES = (
    "policy/model.safetensors",
    "policy/config.json",
    "state.safetensors",
    "state.json",
    "checksums.json",
)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit flipped": flip_one_bit,
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_the_one_before_used(
    tmp_path: Path, file: str, damage: str
) -> None:
    checkpointer = Checkpointer(tmp_path)
    previous, newest = save(checkpointer, 1), save(checkpointer, 2)
    assert latest_checkpoint(checkpointer.folder) == newest
    DAMAGES[damage](newest / file)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is skipped: .* (missing|damaged)"):
        assert latest_checkpoint(checkpointer.folder) == previous


def test_the_newest_is_by_number_and_other_folders_do_not_count(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=3)
    for step in (9, 10):
        save(checkpointer, step)
    (tmp_path / "checkpoint-11-backup").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    latest = latest_checkpoint(checkpointer.folder)
    assert latest is not None
    assert checkpoint_step(latest) == 10
    with pytest.raises(InputError, match="name a folder called checkpoint-N"):
        checkpoint_step(tmp_path / "checkpoint-last")


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


# --- rotation ----------------------------------------------------------------------------------


def test_the_newest_keep_stay(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        save(checkpointer, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_a_failed_save_rotates_nothing_away(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 1)

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(2, {"policy": fail}, {})
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_fault(tmp_path / "checkpoint-1") is None


def test_a_save_after_a_resume_from_further_back_is_the_latest(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    flip_one_bit(save(checkpointer, 20) / "state.json")
    assert save(checkpointer, 15) == latest_checkpoint(checkpointer.folder)
    assert names(tmp_path) == ["checkpoint-15"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 3)
    checkpoint = checkpointer.save(3, {}, {"data": {"cursor": -1}})
    assert load_state(checkpoint) == {"data": {"cursor": -1}}
    assert names(tmp_path) == ["checkpoint-3"]
    assert find_fault(checkpoint) is None


# --- a full disk -------------------------------------------------------------------------------


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_rust(*_: object) -> None:
    # What safetensors 0.8 raises on a full file system (tried on a tmpfs of 1 MB): no OSError, no errno.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [full_disk, full_disk_in_rust])
def test_a_disk_that_fills_in_a_writer_leaves_the_previous_checkpoint_and_says_so(tmp_path: Path, fail) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 1)
    with pytest.raises(DiskFullError, match=r"^the disk is full: .*checkpoint-2 could not be written; free some"):
        checkpointer.save(2, {"policy": write_policy(2), "critic": fail}, {})
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_fault(tmp_path / "checkpoint-1") is None


def test_a_disk_that_fills_at_any_flush_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch) -> None:
    for count in range(100):
        run = tmp_path / str(count)
        checkpointer = Checkpointer(run, keep=1)
        save(checkpointer, 1)
        flushes = iter([lambda: None] * count)
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", lambda _, flushes=flushes: next(flushes, full_disk)())
            try:
                save(checkpointer, 2)
                break
            except DiskFullError:
                pass
        # The last flush comes after the rename, when the new one is whole as well.
        assert names(run) in (["checkpoint-1"], ["checkpoint-1", "checkpoint-2"])
        assert all(find_fault(checkpoint) is None for checkpoint in run.iterdir())
    assert count == len(FILES) + 3, "every file, policy/, the checkpoint and the run's folder are flushed"


def test_other_errors_pass_through_unchanged(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        Checkpointer(tmp_path).save(1, {"policy": fail}, {})
    assert names(tmp_path) == []


# --- SIGKILL -----------------------------------------------------------------------------------

DISK_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def killed(action: Callable[[], object], at_event: int) -> bool:
    """Run `action` in a forked process that SIGKILLs itself before touching the disk again; was it?"""
    child = os.fork()
    if child == 0:
        events = iter(range(1_000_000))

        def kill_at_event(event: str, _: object) -> None:
            if event in DISK_EVENTS and next(events) == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill_at_event)
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the action itself failed"
    return os.WIFSIGNALED(status)


def crash_points(action: Callable[[Path], object], prepared: Path) -> list[Path]:
    """What is left of a copy of the run `prepared` for a kill before each touch of the disk in turn."""
    crashed = []
    for count in range(1000):
        run = prepared.with_name(f"crash-{count}")
        shutil.copytree(prepared, run)
        if not killed(lambda run=run: action(run), count):
            return crashed
        crashed.append(run)
    raise AssertionError("the action never ends")


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "a step that is there already"])
def test_a_kill_at_any_point_of_a_save_leaves_only_whole_checkpoints(tmp_path: Path, step: int) -> None:
    prepared = tmp_path / "run"
    save(Checkpointer(prepared, keep=1), 1)

    def save_again(run: Path) -> None:
        Checkpointer(run, keep=1).save(step, {"policy": write_policy(7)}, {"data": {"cursor": 7}})

    crashed = crash_points(save_again, prepared)
    assert len(crashed) > 20
    outcomes = []
    for run in crashed:
        with warnings.catch_warnings(action="error"):
            latest = latest_checkpoint(Checkpointer(run, keep=1).folder)  # as the next start does
        assert latest is not None
        assert all(find_fault(checkpoint) is None for checkpoint in run.iterdir())
        assert not [name for name in names(run) if name.startswith(".")]
        outcomes.append(load_state(latest)["data"]["cursor"])
    # The old one up to the rename, the new one from there on, and never anything else.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 7}


def test_a_kill_amid_a_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path), 1)

    def half_write(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed(lambda: Checkpointer(tmp_path).save(2, {"policy": half_write}, {}), at_event=-1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert names(tmp_path) == [".tmp-checkpoint-2", "checkpoint-1"]
    Checkpointer(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_plain_save_without_rename_would_fail_the_kill_test(tmp_path: Path) -> None:
    prepared = tmp_path / "run"
    whole = save(Checkpointer(prepared), 1)

    def plain_save(run: Path) -> None:
        shutil.copytree(whole, run / "checkpoint-2")

    crashed = crash_points(plain_save, prepared)
    assert any(find_fault(checkpoint) for run in crashed for checkpoint in run.iterdir())
