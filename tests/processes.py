"""Tiny runs on several processes: as a module it starts them by torchrun, as a program it is what each of them does."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import Parity, Talk, model_folder, run_config

TASKS = {"parity": Parity, "talk": Talk}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def launch(folder: Path, processes: int, runs: Sequence[dict[str, Any]], timeout: float = 240) -> list[list[dict]]:
    """Train each of `runs`, one after the other, on so many processes.

    Args:
        folder: for the answers.
        processes: how many torchrun starts.
        runs: `output` and `overrides` of each; `task`, `resume`, and `signal`: [rank, step] of one that is interrupted.
        timeout: seconds for all of them: a process that waits for another for ever is a failure.

    Returns:
        For each run what every process says of it: how many processes it saw, its rank, how the run ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = [{"task": "parity", "resume": False, "signal": None, **run, "model": model_folder()} for run in runs]
    (folder / "runs.json").write_text(json.dumps(given))
    outcome = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={processes}", __file__, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr[-20000:]
    answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return [list(said) for said in zip(*answers, strict=True)]


def main(folder: Path) -> None:
    from dvpo import distributed
    from dvpo.interrupt import Interrupted, handled
    from dvpo.trainer import Trainer

    answers = []
    for run in json.loads((folder / "runs.json").read_text()):
        config = run_config(Path(run["output"]), *run["overrides"], f"model.path={run['model']}")
        trainer = Trainer(config, task=TASKS[run["task"]](), resume=run["resume"])
        if run["signal"] and distributed.rank() == run["signal"][0]:
            signal_itself_amid(trainer, run["signal"][1])
        ended = "done"
        try:
            with handled():
                trainer.train()
        except Interrupted as stop:
            ended = str(stop)
        answers.append({"processes": distributed.world_size(), "rank": distributed.rank(), "ended": ended})
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(answers))
    distributed.shutdown()


def signal_itself_amid(trainer: Any, step: int) -> None:
    """SIGTERM in the middle of a step's sampling."""
    sample = trainer.collector.sample

    def sampled(draws: Any) -> Any:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(draws)

    trainer.collector.sample = sampled


if __name__ == "__main__":
    main(Path(sys.argv[1]))
