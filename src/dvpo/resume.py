"""From where a run goes on: the newest sound checkpoint of the same run."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvpo.checkpoint import Checkpointer, checkpoint_step, latest_checkpoint
from dvpo.config import Config, differences
from dvpo.distributed import is_main, main_first, on_main
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.nested import all_keys

MAY_CHANGE = ("steps", "device", "distributed", "evaluation", "checkpoint", "log", "output")
"""What a resumed run may set anew: they have no say in the steps already done, but for `steps` where a rate falls to 0
at the last of them, which gives a warning."""
Differences = Mapping[str, tuple[Any, Any]]


def find_checkpoint(config: Config, allow: Iterable[str] = ()) -> Path | None:
    """The newest sound checkpoint in `config.output`; None for a run that was killed before it wrote one.

    Args:
        config: of the resumed run.
        allow: further keys or sections that may differ from the run's own config; each difference gives a warning.

    Raises:
        InputError: no run there, a run of other settings, none but damaged checkpoints, or one that is already past
            `config.steps`.
    """
    folder = Path(config.output)
    written = folder / "config.yaml"
    if not written.exists():
        raise InputError(f"output = {folder} holds no run to resume: check the path, or start without --resume")
    differing = _refuse_another_run(written, config, list(allow))
    with main_first():
        if is_main():
            Checkpointer(folder, config.checkpoint.keep)  # mends what a kill left half-done
    checkpoint = on_main(lambda: latest_checkpoint(folder))  # each reads all of it, for the checksums
    if checkpoint is None and (damaged := sorted(path.name for path in folder.glob("checkpoint-*"))):
        raise InputError(
            f"output = {folder} holds no sound checkpoint, every one is damaged ({', '.join(damaged)}): bring one back "
            "from a copy, or remove them, and the run begins again"
        )
    if checkpoint is not None and checkpoint_step(checkpoint) > config.steps:
        raise InputError(f"steps = {config.steps} lies before {checkpoint}: raise it")
    for sentence in _breaks(config, differing):
        warnings.warn(f"resume: {sentence}", stacklevel=2)
    return checkpoint


def _refuse_another_run(written: Path, config: Config, allow: list[str]) -> Differences:
    """Key -> its value in the run and now, of all that may differ."""
    known = tuple(all_keys(Config))
    if unknown := [key for key in allow if not any(_covers(key, name) for name in known)]:
        raise InputError(f"--allow {unknown[0]}: there is no such setting or section; name one, such as update.epochs")
    differing = differences(load_config(written), config)
    refused = [key for key in differing if not any(_covers(free, key) for free in (*MAY_CHANGE, *allow))]
    if refused:
        raise InputError(
            f"resume: {'; '.join(_change(key, differing) for key in refused)} (see {written}): a resumed run must be "
            f"the same run, so take the old values, start another output folder, or accept the break by --allow "
            f"{','.join(refused)}"
        )
    return differing


def _breaks(config: Config, differing: Differences) -> Iterator[str]:
    """What makes the run another one than it would have been."""
    falling = [
        f"{name}.schedule = {settings.schedule}"
        for name in ("policy_optimiser", "critic_optimiser")
        if (settings := getattr(config, name)).schedule != "constant"
    ]
    if "steps" in differing and falling:
        yield (
            f"{_change('steps', differing)}, and {' and '.join(falling)} falls to 0 at the last: the rate jumps to "
            "where it would stand in a run of the new length"
        )
    for key in differing:
        if not any(_covers(free, key) for free in MAY_CHANGE):
            yield f"{_change(key, differing)}, as --allow says"


def _change(key: str, differing: Differences) -> str:
    old, new = differing[key]
    return f"{key} was {old!r} and is {new!r}"


def _covers(name: str, key: str) -> bool:
    """Whether a key or section holds a key."""
    return key == name or key.startswith(f"{name}.")
