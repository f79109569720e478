"""Tiny runs on several processes: as a module it starts them by torchrun, as a program it is what each of them does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import Parity, Talk, Unread, model_folder, run_config

TASKS = {"parity": Parity, "talk": Talk}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
SPEAKING = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
"""For their environment: one thread, and a process that a signal such as SIGSEGV ends says where each thread was."""


def launch(folder: Path, processes: int, runs: Sequence[dict[str, Any]], timeout: float = 600) -> list[list[dict]]:
    """Train each of `runs`, one after the other, on so many processes.

    Args:
        folder: for the answers.
        processes: how many torchrun starts.
        runs: `output` and `overrides` of each; `task`, `resume`; `signal`: [rank, step] of one that is interrupted;
            `failing`: what `failing` is given, of one whose reward function fails; `unread`: whether responses are
            those of `Unread`.
        timeout: seconds for all of them: a process that waits for another for ever is a failure.

    Returns:
        For each run what every process says of it: how many processes it saw, its rank, how the run ended, and the
        types of weights when they were last used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"task": "parity", "resume": False, "signal": None, "failing": None, "unread": False}
    given = [{**usual, **run, "model": model_folder()} for run in runs]
    (folder / "runs.json").write_text(json.dumps(given))
    outcome = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={processes}", __file__, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **SPEAKING},
    )
    assert outcome.returncode == 0, outcome.stderr[-20000:]
    answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return [list(said) for said in zip(*answers, strict=True)]


def main(folder: Path) -> None:
    from dvpo import distributed
    from dvpo.errors import RunStoppedError
    from dvpo.interrupt import Interrupted, handled
    from dvpo.trainer import Trainer

    answers = []
    for run in json.loads((folder / "runs.json").read_text()):
        config = run_config(Path(run["output"]), *run["overrides"], f"model.path={run['model']}")
        reward = failing(run["failing"]) if run["failing"] else None
        trainer = Trainer(config, task=TASKS[run["task"]](), reward=reward, resume=run["resume"])
        if run["unread"]:
            trainer.collector.sampler = Unread()
        if run["signal"] and distributed.rank() == run["signal"][0]:
            signal_itself_amid(trainer, run["signal"][1])
        used = types_in_use(trainer)
        ended = "done"
        try:
            with handled():
                trainer.train()
        except (Interrupted, RunStoppedError) as stop:
            ended = str(stop)
        answers.append(
            {"processes": distributed.world_size(), "rank": distributed.rank(), "ended": ended, "used": used}
        )
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(answers))
    distributed.shutdown()


def failing(manners: Mapping[str, str]) -> Callable[..., Any]:
    """A reward function with the truth of `Parity`, except for responses to the prompts that have a manner here."""

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float | None]:
        rewards: list[float | None] = [float(sum(ids) % 2 == 0) for ids in completion_ids]
        for place, prompt in enumerate(prompts):
            match manners.get(prompt[-1]["content"]):
                case "raises":
                    raise RuntimeError("not this prompt")
                case "hangs":
                    time.sleep(600)
                case "dies":
                    os._exit(3)
                case "abstains":
                    rewards[place] = None
        return rewards

    return reward


def types_in_use(trainer: Any) -> dict[str, str]:
    """Filled while it trains: the types of a layer's and of the heads' weights as they are multiplied."""
    used: dict[str, str] = {}
    modules = {"layer": trainer.policy.trunk.layers[0].mlp.up_proj}
    if trainer.critic is not None and trainer.critic.trunk is not None:
        modules |= {"critic's layer": trainer.critic.trunk.layers[0].mlp.up_proj, "heads": trainer.critic.heads}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda module, _, name=name: used.update({name: str(next(module.parameters()).dtype)})
        )
    return used


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
