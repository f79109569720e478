"""Atomic checkpoints: save, verify, resume. A kill, a full disk or a damaged file costs at most one interval.

A checkpoint is a folder `checkpoint-N` of a run:

    policy/            a plain Hugging Face folder: weights, config, tokenizer
    adapter/           with LoRA, what of these weights was trained, as peft reads it
    critic/            the critic's weights and shape
    state.safetensors  every other tensor: optimisers, RNGs ...
    state.json         everything else, and which tensor stands where (no pickle: loading cannot run code)
    checksums.json     SHA-256 of every file above; written last, so it vouches for a whole folder

It is written under a hidden name, flushed to the disk, and renamed: `checkpoint-N` is whole or absent.
"""

import hashlib
import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dvpo.durable import disk_full_named, flush_file, flush_folder, write_atomically
from dvpo.errors import InputError

CHECKSUMS = "checksums.json"
UNFINISHED = ".tmp-"
"""Prefix of a folder that is being written or removed; whatever bears it after a kill is rubbish."""
REPLACED = ".replaced-"
"""Prefix of a checkpoint making room for another of its step: whole, and needed if that one never came."""

Writer = Callable[[Path], object]
"""Writes one part as a folder at the given path, e.g. `critic.save` or `model.save_pretrained`."""


class Stateful(Protocol):
    """A part with state: data cursor, noise visits, optimiser, schedule, RNGs ..."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Checkpointer:
    """Writes the checkpoints of one run, from one process, and keeps the newest `keep` of them and those to be spared.

    Making one clears away what a killed save left behind; to only read checkpoints, use `latest_checkpoint`.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = folder
        self.keep = keep
        with disk_full_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._tidy()

    def save(
        self, step: int, writers: Mapping[str, Writer], state: Mapping[str, Any], spared: Collection[int] = ()
    ) -> Path:
        """Write `checkpoint-<step>`; on a failure the earlier ones stand and nothing half-written is left.

        Args:
            step: steps done. Checkpoints of later steps, from a past that a resume gave up, are removed.
            writers: subfolder -> how to write it.
            state: name -> nested plain values and tensors, e.g. `state_of(parts)`; what `load_state` returns.
            spared: steps whose checkpoints stay, however old.

        Returns:
            The checkpoint's folder.

        Raises:
            DiskFullError: if there is no room.
            TypeError: if `state` holds an object that cannot be kept without pickle.
        """
        target = self.folder / f"checkpoint-{step}"
        aside = self.folder / f"{UNFINISHED}{target.name}"
        try:
            with disk_full_named(target):
                aside.mkdir()
                for name, write in writers.items():
                    write(aside / name)
                _write_state(aside, state)
                _seal(aside)
                self._publish(aside, target)
        except BaseException:
            self._tidy()
            raise
        self._rotate(step, spared)
        return target

    def _publish(self, aside: Path, target: Path) -> None:
        replaced = target.with_name(f"{REPLACED}{target.name}")
        if target.exists():
            target.rename(replaced)
        aside.rename(target)
        flush_folder(self.folder)
        if replaced.exists():
            _remove(replaced)

    def _rotate(self, newest: int, spared: Collection[int]) -> None:
        """Remove old checkpoints, and those beyond `newest`, which would win over it at the next resume."""
        checkpoints = _steps(self.folder)
        past = sorted(step for step in checkpoints if step <= newest)
        kept = {*past[-self.keep :], *spared}
        for step, checkpoint in checkpoints.items():
            if step not in kept:
                _remove(checkpoint)

    def _tidy(self) -> None:
        """Undo what was interrupted: bring back a checkpoint whose replacement never came, drop the rest."""
        for replaced in self.folder.glob(f"{REPLACED}*"):
            target = self.folder / replaced.name.removeprefix(REPLACED)
            if target.exists():
                _remove(replaced)
            else:
                replaced.rename(target)
        for unfinished in self.folder.glob(f"{UNFINISHED}checkpoint-*"):
            shutil.rmtree(unfinished)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below `folder` that is complete and undamaged; None if there is none.

    Damaged ones are skipped with a warning that says what is wrong with them.
    """
    for _, checkpoint in sorted(_steps(folder).items(), reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is skipped: {fault}", stacklevel=2)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that its checksum does not fit; None if all is well."""
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_bytes())
    except (OSError, ValueError):
        return f"{CHECKSUMS} is missing or damaged"
    for name, checksum in checksums.items():
        try:
            actual = _sha256(checkpoint / name)
        except OSError:
            return f"{name} is missing or cannot be read"
        if actual != checksum:
            return f"{name} is damaged (its checksum differs)"
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint, from its folder's name.

    Raises:
        InputError: if the folder is not called `checkpoint-N`.
    """
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if match is None:
        raise InputError(f"{checkpoint} is no checkpoint: name a folder called checkpoint-N")
    return int(match[1])


def _steps(folder: Path) -> dict[int, Path]:
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return {checkpoint_step(path): path for path in named}


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    for path in files:
        flush_file(path)
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_folder(path)
    write_atomically(folder / CHECKSUMS, [json.dumps(checksums, indent=1).encode()])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill amid the removal must not leave half a folder under a checkpoint's name.
    doomed = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name.removeprefix(REPLACED)}-removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def state_of(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """The state of every registered part, as `Checkpointer.save` takes it."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: Mapping[str, Stateful], state: Mapping[str, Any]) -> None:
    """Give every registered part its state back.

    Raises:
        InputError: if the checkpoint was written by a run with other parts.
    """
    if parts.keys() != state.keys():
        raise InputError(
            f"the checkpoint holds the state of {sorted(state)}, but this run needs {sorted(parts)}: "
            "resume with the config that wrote it"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that `Checkpointer.save` was given, bit for bit, tensors on the CPU."""
    tree = json.loads((checkpoint / "state.json").read_bytes())
    return _decode(tree, load_file(checkpoint / "state.safetensors"))


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(dict(state), "", tensors)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(tree, allow_nan=False))


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Nested plain values as JSON; what JSON does not have becomes an object with one key, its kind."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if kind is tuple:
        return {"tuple": _encode(list(value), path, tensors)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        items = [(key, _encode(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(type(key) is str for key in value):
            return {"dict": dict(items)}
        return {"items": [[_encode(key, path, tensors), item] for key, item in items]}
    if isinstance(value, np.ndarray):
        return {"array": _put(torch.from_numpy(value), path, tensors)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _put(value, path, tensors)}
    raise TypeError(f"the state at {path} is a {kind.__name__}, which cannot be kept without pickle")


def _put(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    name = path
    while name in tensors:  # the keys 1 and "1" have one path
        name += "'"
    # Copied, because safetensors refuses tensors that share memory, such as views of one buffer.
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return name


def _decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    match kind:
        case "float":
            return float(value)
        case "tuple":
            return tuple(_decode(value, tensors))
        case "bytes":
            return bytes.fromhex(value)
        case "dict":
            return {key: _decode(item, tensors) for key, item in value.items()}
        case "items":
            return {_decode(key, tensors): _decode(item, tensors) for key, item in value}
        case "array":
            return tensors[value].numpy()
        case "tensor":
            return tensors[value]
    raise InputError(f"state.json holds an unknown kind {kind!r}: the checkpoint is of a newer version of dvpo")


class RNGState:
    """The global generators of this process as one part: python, numpy, torch (CPU and GPUs)."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        # A resume on fewer GPUs (or none) takes what fits.
        for device, state in zip(range(torch.cuda.device_count()), state_dict["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)
