"""Where a run's figures go besides its folder: TensorBoard, Weights & Biases, trackio, each only if the config asks.

metrics.jsonl is the record; a sink is a copy for those who look elsewhere. What is missing or wrong when a run begins
is refused in one sentence. After that nothing that a sink raises ends a run: each row that it did not take is a fault
(kind `sink`), the first of them a warning, and a sink that failed `PATIENCE` times in a row is left alone.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dvpo.errors import InputError
from dvpo.settings_learning import LogConfig

PATIENCE = 10
"""A sink may take seconds to fail, at every step."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""The setting below `log`, which is also the extra's name -> what is imported."""


class Sink(Protocol):
    """Takes figures. A step may come twice, once for its training and once for its evaluation."""

    def log(self, step: int, figures: Mapping[str, float]) -> object: ...

    def close(self) -> object: ...


@dataclass(frozen=True)
class Identity:
    """Which run it is."""

    folder: Path
    run_id: str
    """For ever: with the same id a sink continues the run instead of beginning another."""
    settings: Mapping[str, Any]
    """The whole config, for sinks that show it."""
    resume_step: int | None
    """The run goes on behind this step; None for a fresh run."""


def refuse_unusable(config: LogConfig) -> None:
    """Import what the config asks for, and see that W&B has a key: before any long work.

    Raises:
        InputError: a package is missing, or nobody is logged in.
    """
    for name in _wanted(config):
        module = _imported(name)
        if name == "wandb" and not config.offline:
            _refuse_without_key(module)


class Sinks:
    """The open sinks of one run. Nothing that they raise gets out of here.

    Raises:
        InputError: a package is missing, or a sink of a fresh run cannot be opened; a resumed run goes on without it.
    """

    def __init__(self, config: LogConfig, identity: Identity) -> None:
        self._open: dict[str, Sink] = {}
        self._failures: dict[str, int] = {}
        """Sink -> failures in a row."""
        self._warned: set[str] = set()
        self._faults: list[dict[str, Any]] = []
        for name in _wanted(config):
            module = _imported(name)
            try:
                self._open[name] = OPENERS[name](module, config, identity)
            except Exception as error:  # whatever a foreign package raises
                if identity.resume_step is None:
                    self.close()
                    raise InputError(
                        f"log.{name} = true, but the run cannot be opened there ({_reason(error)}): mend that, "
                        f"or set log.{name}=false{' or log.offline=true' if name == 'wandb' else ''}"
                    ) from None
                self._note(name, identity.resume_step, error)

    def log(self, step: int, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Hand over the finite numbers among the figures; the faults since the last call, as rows of faults.jsonl."""
        numbers = {key: float(value) for key, value in figures.items() if _is_number(value)}
        for name, sink in list(self._open.items()):
            try:
                sink.log(step, numbers)
                self._failures[name] = 0
            except Exception as error:  # whatever a foreign package raises
                self._note(name, step, error)
                if self._failures[name] == PATIENCE:
                    del self._open[name]
                    _warn(f"step {step}: log.{name} failed {PATIENCE} times in a row and is left alone from here on")
        faults, self._faults = self._faults, []
        return faults

    def close(self) -> None:
        for name, sink in self._open.items():
            try:
                sink.close()
            except Exception as error:  # whatever a foreign package raises
                _warn(f"log.{name} could not be closed ({_reason(error)})")

    def _note(self, name: str, step: int, error: Exception) -> None:
        self._failures[name] = self._failures.get(name, 0) + 1
        self._faults.append({"kind": "sink", "sink": name, "message": _reason(error)})
        if name not in self._warned:
            self._warned.add(name)
            _warn(
                f"step {step}: log.{name} failed ({_reason(error)}); the run goes on, and each row that is missing "
                "there is a row of faults.jsonl"
            )


# Each sink


class _TensorBoard:
    def __init__(self, module: Any, _: LogConfig, identity: Identity) -> None:
        # Events of steps that a resume makes anew are taken back.
        purge_step = None if identity.resume_step is None else identity.resume_step + 1
        self._writer = module.SummaryWriter(str(identity.folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, module: Any, config: LogConfig, identity: Identity) -> None:
        self._run = module.init(
            project=config.project,
            name=run_name(config, identity),
            id=identity.run_id,
            resume="allow",
            config=dict(identity.settings),
            dir=str(identity.folder),
            mode="offline" if config.offline else None,  # None: as WANDB_MODE says, else online
            reinit="create_new",  # a run that somebody else has open in this process is left alone
            settings=module.Settings(console="off"),  # a progress bar is no log
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_WandB):
    def __init__(self, module: Any, config: LogConfig, identity: Identity) -> None:
        # trackio finds a run by its name: the id makes that unique.
        name = f"{run_name(config, identity)}-{identity.run_id}"
        self._run = module.init(project=config.project, name=name, resume="allow", config=dict(identity.settings))


OPENERS: dict[str, Callable[[Any, LogConfig, Identity], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def run_name(config: LogConfig, identity: Identity) -> str:
    """What the run is called there: `log.name`, else its folder's name."""
    return config.name or identity.folder.absolute().name


def _wanted(config: LogConfig) -> list[str]:
    return [name for name in MODULES if getattr(config, name)]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError:
        raise InputError(
            f"log.{name} = true needs {name}, which is not installed: "
            f"run `pip install 'dvpo[{name}]'`, or set log.{name}=false"
        ) from None


def _refuse_without_key(module: Any) -> None:
    try:
        module.login()  # asks for a key in a terminal; without one it raises at once
    except module.errors.UsageError as error:
        raise InputError(
            f"log.wandb = true, but nobody is logged in to Weights & Biases ({_reason(error)}): run `wandb login`, set "
            "WANDB_API_KEY, or set log.offline=true"
        ) from None
    except Exception:
        return  # no network, say: that is seen when the run is opened


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
