"""`dvpo doctor`: what is installed, and what a config will need in memory and time."""

import math
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dvpo.config import Config
from dvpo.faults import FaultTally
from dvpo.lora import refuse_without_peft
from dvpo.memory import Prediction, predict
from dvpo.plain_text import duration
from dvpo.policy import choose_device, shape_of
from dvpo.provenance import installed_version, machine
from dvpo.rewards import Fault
from dvpo.settings_learning import DistributedConfig, LogConfig
from dvpo.sinks import refuse_unusable
from dvpo.trainer import Trainer
from dvpo.warmstart import starting_model

REQUIRED = (
    *("torch", "transformers", "safetensors", "pydantic", "pyyaml", "rich", "cloudpickle"),
    *("jinja2", "markupsafe", "numba", "plotille"),
)
EXTRAS = {
    "peft": "lora",
    "verl": "verl",
    "math-verify": "math",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "datasets": "data",
    "reasoning-gym": "gym",
}
TRIAL_STEPS = 2
ALONE = DistributedConfig()
MIB = 1 << 20
ALWAYS = ("base", "weights", "moments")
UPDATE = ("copies", "gradients", "activations", "heads", "rollout")
"""Parts of a `Prediction`."""


def report_installation(console: Console) -> None:
    """Print versions of what is needed and of what is optional, and the machine."""
    table = Table(title="installed")
    for column in ("package", "version", "needed for"):
        table.add_column(column)
    for name in REQUIRED:
        table.add_row(name, installed_version(name) or Text("missing", "red"), "everything")
    for name, extra in EXTRAS.items():
        table.add_row(name, installed_version(name) or "-", Text(f"optional: pip install 'dvpo[{extra}]'"))
    console.print(table)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = machine("cpu")
    console.print(f"python {sys.version.split()[0]}, {facts['cpu']}, {torch.get_num_threads()} threads of torch")
    console.print(f"GPUs: {', '.join(gpus) or 'none, everything runs on the CPU'}")
    console.print(f"disk free here: {shutil.disk_usage('.').free / 2**30:.1f} GiB")


def report_needs(config: Config, console: Console) -> None:
    """Load what the config names, run a few real steps in a temporary folder, and print what they took.

    Raises:
        InputError: whatever would stop the run itself.
    """
    refuse_unusable(config.log)
    refuse_without_peft(config.model.lora)
    if config.distributed.strategy == "fsdp":
        console.print(
            "distributed.strategy = fsdp: what follows is one process with whole models; in the run each holds its "
            "share of weights, moments and gradients, and the policy whole while it samples; `--gpus N` predicts that",
            soft_wrap=True,
        )
    _print_prediction(replace(config, distributed=ALONE), console)
    with tempfile.TemporaryDirectory(prefix="dvpo-doctor-") as folder:
        # What is measured is a step that moves all of both models.
        update, critic = replace(config.update, actor_warmup_steps=0), replace(config.critic, verdict_only_steps=0)
        steps_needed = max(config.steps, TRIAL_STEPS)
        # A trial is no run: it goes to no sink.
        output = str(Path(folder) / "run")
        trial = replace(config, output=output, steps=steps_needed, log=LogConfig(), distributed=ALONE)
        trial = replace(trial, update=update, critic=critic)
        rewards = _Rewards()
        trainer = Trainer(trial, observer=rewards)
        models = [part for part in (trainer.policy.model, trainer.critic) if part is not None]
        counts = [(_parameters(model), _parameters(model, only_trained=True)) for model in models]
        held = [*models, *([trainer.reference.model] if trainer.reference else [])]
        weights, learning = sum(p.nbytes for p in _distinct(held)), sum(trained for _, trained in counts)
        try:
            steps = [trainer.train_step() for _ in range(TRIAL_STEPS)]
        finally:
            trainer.close()
    # Of what trains gradient and AdamW's two moments as well, in float32.
    state = weights + 12 * learning
    # Every model whole, the moments, and with adapters what is trained once more, by itself.
    on_disk = 4 * (sum(every for every, _ in counts) + (3 if config.model.lora.rank else 2) * learning)
    named = zip(("policy", "critic"), counts, strict=False)
    parameters = [(f"{name} parameters (of them training)", f"{every:,} ({own:,})") for name, (every, own) in named]
    seconds = steps[-1]["time/step"]
    longest = config.sampling.max_completion_length
    batch = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    table = Table(title=f"{config.algorithm}: measured over {TRIAL_STEPS} real steps on this machine")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for what, figure in (
        *parameters,
        ("weights, gradients, optimisers", f"{state / MIB:,.0f} MiB"),
        ("peak memory of the process", f"{_peak_memory(trainer.device) / MIB:,.0f} MiB"),
        ("responses a step", f"{batch:,}"),
        *rewards.rows(steps),
        ("response length, mean", f"{steps[-1]['rollout/length']:.0f} tokens"),
        (f"responses cut at {longest} tokens", f"{100 * steps[-1]['rollout/truncated']:.1f}%"),
        (f"one step (of {TRIAL_STEPS}: a guess)", f"{seconds:.2f} s (sampling {steps[-1]['time/sample']:.2f} s)"),
        (f"{config.steps} steps without evaluations", duration(seconds * config.steps)),
        ("one checkpoint on disk", f"{on_disk / MIB:,.0f} MiB"),
    ):
        table.add_row(what, Text(figure))
    console.print(table)


class _Rewards:
    """What the trial's rewards were and what went wrong with them; an `Observer` of the trainer."""

    def __init__(self) -> None:
        self._tally = FaultTally()

    def on_rewards(self, step: int, faults: Sequence[Fault], answers: int) -> None:
        self._tally.add(faults, answers)

    def on_step(self, step: int, figures: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None: ...

    def rows(self, steps: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
        """Mean, missing and faults of the steps; then the first fault, if there is one."""
        seen = [figures["reward/observed"] for figures in steps if math.isfinite(figures["reward/observed"])]
        mean = f"{sum(seen) / len(seen):.3f}" if seen else "-"
        missing = sum(figures["reward/missing"] for figures in steps) / len(steps)
        failed = f"failed {self._tally.lost:,}/{self._tally.answers:,}"
        found = [(f"rewards of {len(steps)} steps", f"mean {mean}, missing {100 * missing:.1f}%, {failed}")]
        if not seen:
            found.append(("learnt from them", "nothing: no answer had a reward"))
        return found + ([("first failure of the reward", self._tally.first)] if self._tally.first else [])


def _print_prediction(config: Config, console: Console) -> None:
    """From the config alone: it stands there if the trial runs out of memory. Nothing without a model's shape."""
    try:
        shape = shape_of(starting_model(config))
        on_gpu = choose_device(config.device) != "cpu"
        need = predict(config, shape, 0 if on_gpu else _peak_memory(torch.device("cpu")), on_gpu)
    except (ValueError, AttributeError, TypeError):
        return  # the trial says what is wrong with the model; of a family of another shape nothing is predicted
    always, update = (_parts(need, names) for names in (ALWAYS, UPDATE))
    console.print(
        f"predicted peak at full lengths: {need.peak / MIB:,.0f} MiB ({always}; and the larger of sampling "
        f"{need.sampling / MIB:,.0f} and an update {need.update / MIB:,.0f}: {update})",
        soft_wrap=True,
    )


def _parts(need: Prediction, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {getattr(need, name) / MIB:,.0f}" for name in names)


def _distinct(modules: Sequence[torch.nn.Module]) -> Iterable[torch.nn.Parameter]:
    """Their weights; what several modules share comes once."""
    return {id(p): p for module in modules for p in module.parameters()}.values()


def _parameters(module: torch.nn.Module, only_trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trained)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
