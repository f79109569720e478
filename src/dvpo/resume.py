"""From where a run goes on: the newest sound checkpoint of the same run."""

from pathlib import Path

from dvpo.checkpoint import Checkpointer, checkpoint_step, latest_checkpoint
from dvpo.config import Config, differences, load_config
from dvpo.distributed import barrier, is_main
from dvpo.errors import InputError

MAY_CHANGE = ("steps", "device", "evaluation.", "checkpoint.", "log.", "output")
"""What a resumed run may set anew: nothing that has a say in the steps already done."""


def find_checkpoint(config: Config) -> Path | None:
    """The newest sound checkpoint in `config.output`; None for a run that was killed before it wrote one.

    Raises:
        InputError: no run there, a run of other settings, or one that is already past `config.steps`.
    """
    folder = Path(config.output)
    written = folder / "config.yaml"
    if not written.exists():
        raise InputError(f"output = {folder} holds no run to resume: check the path, or start without --resume")
    changed = [
        f"{key} was {old!r} and is {new!r}"
        for key, (old, new) in differences(load_config(written), config).items()
        if not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise InputError(
            f"resume: {'; '.join(changed)} (see {written}): a resumed run must be the same run, so take the old "
            "values, or start another output folder"
        )
    if is_main():
        Checkpointer(folder, config.checkpoint.keep)  # mends what a kill left half-done
    barrier()
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None and checkpoint_step(checkpoint) > config.steps:
        raise InputError(f"steps = {config.steps} lies before {checkpoint}: raise it")
    return checkpoint
