"""Where a result comes from: versions, machine, commit, and what was changed since that commit."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parent


class Source(NamedTuple):
    """The state of the package's source tree; all None outside a git checkout (an installed wheel)."""

    commit: str | None
    dirty: bool | None
    diff: str | None
    """The uncommitted changes, new files included, as `git apply` takes them; empty if there are none."""


def source() -> Source:
    """The commit and the uncommitted changes of the running package; its repository may hold other things."""
    # A virtual environment may lie inside somebody's repository: only a tracked package is a source tree.
    root = _git(PACKAGE, "rev-parse", "--show-toplevel").strip()
    if not root or not _git(PACKAGE, "ls-files", "errors.py"):
        return Source(None, None, None)
    commit = _git(root, "rev-parse", "HEAD").strip() or None
    compare = ("diff", "--binary", "--no-color", "--no-ext-diff")
    changes = _git(root, *compare, "HEAD", "--", str(PACKAGE))
    new_files = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", str(PACKAGE))
    for name in new_files.split("\0")[:-1]:
        changes += _git(root, *compare, "--no-index", "--", os.devnull, name)
    return Source(commit, bool(changes), changes)


def _git(folder: Path | str, *arguments: str) -> str:
    """What git says in a folder; nothing if it fails or is not installed."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            check=False,
            capture_output=True,
            timeout=30,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout


def versions() -> dict[str, str | None]:
    """The versions that a result depends on."""
    packages = ("dvpo", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in packages}}


def installed_version(package: str) -> str | None:
    """None: not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str | torch.device) -> dict[str, Any]:
    """The kind of machine, and what of it this process uses; nothing that tells whose it is."""
    device = torch.device(device)
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def cpu_model(listing: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; one name may cover generations whose last bits differ, so family and model go with it."""
    try:
        lines = listing.read_text().partition("\n\n")[0].splitlines()  # of the first processor
    except OSError:
        lines = []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    kind = [f"{name.removeprefix('cpu ')} {said[name]}" for name in ("cpu family", "model") if name in said]
    return said["model name"] + (f" ({', '.join(kind)})" if kind else "")


def config_hash(config: str) -> str:
    """Twelve hex digits that tell two configs (as text) apart."""
    return hashlib.sha256(config.encode()).hexdigest()[:12]
