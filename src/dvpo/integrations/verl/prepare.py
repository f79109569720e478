"""A critic for verl, made from a language model: `python -m dvpo.integrations.verl.prepare MODEL FOLDER`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from dvpo.critic import critic_shape, load_critic, make_critic
from dvpo.errors import InputError
from dvpo.integrations.verl.objective import make_objective
from dvpo.nested import set_dotted
from dvpo.policy import open_policy

# The heads are drawn, and whoever prepares a critic twice should get it twice.
SEED = 0


def packaged_settings() -> dict[str, Any]:
    """The `dvpo` section of the packaged Hydra config."""
    text = (files("dvpo.integrations.verl.config") / "dvpo.yaml").read_text()
    settings: dict[str, Any] = yaml.safe_load(text)["dvpo"]
    return settings


def prepare(model: str | Path, folder: str | Path, settings: Mapping[str, Any], tokenizer: str | None = None) -> None:
    """Write a folder for `critic.model.path`: the model's trunk with fresh heads, config and tokenizer.

    Args:
        model: a causal language model, a folder or a hub name; or the `critic/` folder of a dvpo checkpoint, whose
            heads are kept.
        folder: where to; it must not exist, or be empty.
        settings: the `dvpo` section of the verl config.
        tokenizer: a model with the tokenizer, where `model` is a critic's folder.

    Raises:
        InputError: no model there, a folder in use, or a critic that the settings do not fit.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"FOLDER = {folder} is not empty: name a new one")
    objective = make_objective(settings, gamma=1.0, lam=0.95)  # what a critic is made of does not depend on them
    trained = (Path(model) / "critic.json").exists()
    if trained and tokenizer is None:
        raise InputError(f"MODEL = {model} is a critic without a tokenizer: name its model with --tokenizer")
    if trained:
        objective.check_shape(critic_shape(model), str(model))
        critic = load_critic(model)
    policy = open_policy(str(tokenizer or model), torch.device("cpu"))
    if not trained:
        torch.manual_seed(SEED)
        critic = make_critic("quantile", objective.config.critic, policy)
    trunk: Any = critic.trunk
    trunk.config.architectures = [type(trunk).__name__]  # verl insists on one
    critic.save(folder)
    policy.tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dvpo.integrations.verl.prepare", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a causal language model, or a critic/ folder of dvpo")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder, for critic.model.path")
    parser.add_argument(
        "overrides", nargs="*", metavar="dvpo.critic.key=value", help="as for verl: dvpo.critic.num_heads=5"
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer, where MODEL is a critic/ folder")
    arguments = parser.parse_args(argv)
    values: dict[str, Any] = {"dvpo": packaged_settings()}
    try:
        for override in arguments.overrides:
            set_dotted(values, override.lstrip("+"))  # Hydra's sign for a key that the packaged config leaves out
        if foreign := set(values) - {"dvpo"}:
            raise InputError(f"{min(foreign)} is no setting of a prepared critic: they begin with dvpo.critic")
        prepare(arguments.model, arguments.folder, values["dvpo"], arguments.tokenizer)
    except InputError as error:
        print(f"dvpo: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
