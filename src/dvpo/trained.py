"""What a run left is opened: the checkpoint that is meant, its policy and critic, and what its config cannot name."""

import json
from pathlib import Path
from typing import Literal

import torch

from dvpo.checkpoint import find_fault, latest_checkpoint
from dvpo.config import Config
from dvpo.critic import Critic, load_critic
from dvpo.errors import InputError
from dvpo.frozen import hold_frozen
from dvpo.loading import load_config
from dvpo.policy import Policy, choose_device, open_policy


def sound_checkpoint(source: str | Path) -> Path:
    """The checkpoint that is named, or the newest sound one of the run that is.

    Raises:
        InputError: a file, a run that has not saved any yet or no sound one, a checkpoint that is damaged.
    """
    folder, written = Path(source), Path(source) / "config.yaml"
    if folder.is_file():
        raise InputError(f"{source} is a file: give a run's folder (`output` in its config) or a checkpoint-N in one")
    if written.exists() and not any(folder.glob("checkpoint-*")):
        every = load_config(written).checkpoint.every
        raise InputError(
            f"{source} has no checkpoint yet (checkpoint.every = {every}): wait for it, or go on with dvpo train "
            f"{written} --resume"
        )
    named = folder.name.startswith("checkpoint-")
    checkpoint = folder if named else latest_checkpoint(folder)
    if checkpoint is None or not (checkpoint / "policy").is_dir():
        raise InputError(f"{source} holds no sound checkpoint: give a run folder or a checkpoint-N folder in one")
    if named and (fault := find_fault(checkpoint)):
        raise InputError(f"{checkpoint} is damaged ({fault}): take another checkpoint")
    return checkpoint


def open_trained(checkpoint: Path, config: Config, device: str | None = None) -> Policy:
    """The policy of a checkpoint, as its run's config opens it; `device` wins over the config's."""
    place, model = torch.device(choose_device(device or config.device)), config.model
    return open_policy(checkpoint / "policy", place, model.dtype, template=model.template, learns=False)


def open_trained_critic(checkpoint: Path, policy: Policy) -> Critic:
    """The critic of a checkpoint, to be asked and not to be trained further.

    Raises:
        InputError: files missing, or weights that do not fit.
    """
    critic = load_critic(checkpoint / "critic", policy.device, policy.dtype)
    if critic.trunk is not None:
        hold_frozen(critic.trunk, policy.dtype)
    return critic


def refuse_what_python_gave(source: str | Path, config: Config, part: Literal["task", "reward"]) -> None:
    """Check that the config names the task, or the reward, that the run really had.

    Args:
        source: the run's folder, or a checkpoint in it.
        config: the run's, or one that names what had been given in Python.
        part: of the config.

    Raises:
        InputError: it was given in Python.
    """
    run = Path(source).parent if Path(source).name.startswith("checkpoint-") else Path(source)
    try:
        manifest = json.loads((run / "manifest.json").read_bytes())
    except (OSError, ValueError):  # a checkpoint by itself
        return
    key, name = {"task": ("name", config.task.name), "reward": ("function", config.reward.function)}[part]
    if any(session.get("in_python", {}).get(part) == name for session in (manifest, *manifest["resumes"])):
        raise InputError(
            f"{run} was given its {part} in Python, and its config says {part}.{key} = {name}: set {part}.{key} to "
            f"my_module:its_name, as an override of `dvpo eval` or in config.yaml, or ask in Python"
        )
