"""One run's config: frozen dataclasses, validated when made; written as YAML.

Its sections stand in `dvpo.settings` and `dvpo.settings_learning`; what one says about another is checked here; what a
row and the noise's rates ask of them, in `dvpo.loading`.
"""

import functools
from dataclasses import replace
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter

from dvpo.nested import all_keys
from dvpo.settings import (
    Count,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    OneTaskConfig,
    RewardConfig,
    SamplingConfig,
    TaskConfig,
    section,
)
from dvpo.settings_learning import (
    ActorConfig,
    AdvantageConfig,
    AlarmsConfig,
    CheckpointConfig,
    CriticConfig,
    CriticOptimiserConfig,
    DistributedConfig,
    EvaluationConfig,
    LogConfig,
    OptimiserConfig,
    UpdateConfig,
)

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The same text, much faster where PyYAML has its C part: a study writes the config of every cell at its start."""

OF_FILES = ("path", "id_path", "ood_path", "prompt_column", "held_out", "truth", "answer_pattern")
TASKS_WITH = {
    "ood": ("science", "dialogue"),
    **dict.fromkeys(("generators", "ood_generators"), ("reasoning_gym",)),
    **dict.fromkeys(OF_FILES, ("files",)),
}
"""Setting of `task` -> the tasks that read it."""


@section
class Config:
    """One run."""

    output: str = "runs/default"
    """The run's folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of prompts, draws, heads, minibatches and noise."""
    algorithm: str = "dvpo"
    """A row of `dvpo.algorithms.ALGORITHMS`, or `my_module:row`."""
    steps: Count = 100
    """Rounds of sampling, each with its optimiser steps."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` ..."""
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    noise: NoiseConfig = NoiseConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    policy_optimiser: OptimiserConfig = OptimiserConfig()
    critic_optimiser: CriticOptimiserConfig = CriticOptimiserConfig()
    update: UpdateConfig = UpdateConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    alarms: AlarmsConfig = AlarmsConfig()

    def __post_init__(self) -> None:
        if self.distributed.strategy == "fsdp" and self.critic.verdict_only_steps:
            raise ValueError(
                f"critic.verdict_only_steps = {self.critic.verdict_only_steps} lets a part of the critic learn alone, "
                "which distributed.strategy = fsdp cannot: set it to 0, or take ddp"
            )
        batch = self.sampling.responses_per_step
        if batch < self.update.minibatches:
            raise ValueError(
                f"update.minibatches = {self.update.minibatches} exceeds the {batch} responses of a step: "
                "lower it, or raise sampling.prompts_per_step or sampling.samples_per_prompt"
            )
        if self.actor.kl.target is not None and self.actor.kl.horizon < batch:
            raise ValueError(
                f"actor.kl.horizon = {self.actor.kl.horizon} is shorter than a step of {batch} responses: raise it"
            )
        rest, rising = self.update.actor_warmup_steps, self.policy_optimiser.warmup_steps
        if 0 < rising <= rest:
            raise ValueError(
                f"policy_optimiser.warmup_steps = {rising} end while the policy still rests "
                f"(update.actor_warmup_steps = {rest}), and its first step would be a whole one: count them from step "
                f"1, {rest + rising} say, or set 0"
            )
        if self.alarms.kl_reference and not self.actor.kl.coef:
            raise ValueError(
                f"alarms.kl_reference = {self.alarms.kl_reference:g} watches what is measured only where "
                "actor.kl.coef is above 0: set that, to 1e-6 say, or drop the alarm"
            )
        # Measured before each minibatch's own update: the first sees the sampling policy itself.
        once = self.update.epochs * self.update.minibatches == 1
        if "kl" in self.alarms.stop and once and not self.alarms.kl_reference:
            raise ValueError(
                "alarms.stop names kl, which cannot ring: a step of one update (update.epochs, update.minibatches) is "
                "measured before it; drop it, or set alarms.kl_reference and actor.kl.coef"
            )
        if self.reward.overlong > self.sampling.max_completion_length:
            raise ValueError(
                f"reward.overlong = {self.reward.overlong} exceeds sampling.max_completion_length = "
                f"{self.sampling.max_completion_length}: lower it"
            )
        self._check_tasks()
        self._check_lora()
        if self.checkpoint.keep_best and not self.evaluation.every:
            raise ValueError(
                "checkpoint.keep_best = true chooses among evaluations, but evaluation.every = 0 makes none during "
                "training: set it, to 10 say, or keep_best to false"
            )

    def _check_tasks(self) -> None:
        """A task of files has a file, and a mix is a list of tasks."""
        name, mix = self.task.name, self.task.mix
        if any(task.name == "files" and not task.path for task in (self.task, *mix)):
            raise ValueError("task.path is empty: name the file with your prompts (task.path=my_prompts.jsonl)")
        for task in (self.task, *mix):
            _refuse_settings_of_others(task)
        if mix and name != "mix":
            raise ValueError(f"task.mix holds several tasks, but task.name = {name}: set it to mix")
        if name == "mix" and not mix:
            raise ValueError("task.mix is empty: list the tasks of the mix, each with its name and weight")
        if any(task.name == "mix" for task in mix):
            raise ValueError("task.mix holds a mix: list all tasks in one task.mix")

    @property
    def critic_lora(self) -> LoraConfig:
        """The adapters of the critic's trunk: its own settings, else the policy's; none for a trunk that is kept."""
        if self.critic.trunk != "own" or not self.model.lora.rank:
            return LoraConfig()
        own = {key: value for key, value in vars(self.critic.lora).items() if value is not None}
        return replace(self.model.lora, **own)

    def _check_lora(self) -> None:
        """A critic has adapters where the policy has them, and where its trunk learns."""
        rank, trunk = self.critic.lora.rank, self.critic.trunk
        if rank and trunk != "own":
            raise ValueError(
                f"critic.lora.rank = {rank} adapts a trunk that learns, but critic.trunk = {trunk}: set it to own, or "
                "drop the rank"
            )
        own = [name for name in ("alpha", "targets") if getattr(self.critic.lora, name) is not None]
        if own and (trunk != "own" or not self.model.lora.rank):
            raise ValueError(
                f"critic.lora.{own[0]} is set, but the critic has no adapters: set model.lora.rank and critic.trunk = "
                "own, or drop it"
            )
        if rank and not self.model.lora.rank:
            raise ValueError(
                f"critic.lora.rank = {rank} builds on the starting weights, which a run keeps only where "
                "model.lora.rank is above 0: set that too, or drop the critic's"
            )


def _refuse_settings_of_others(task: OneTaskConfig) -> None:
    """A file that is named beside `math` would not be read, and nothing else would say so."""
    if task.name not in {"math", "mix"}.union(*TASKS_WITH.values()):
        return  # one's own task is given the whole section, and a wrong name is `make_task`'s matter
    for key, owners in TASKS_WITH.items():
        value = getattr(task, key)
        if task.name not in owners and value != getattr(OneTaskConfig, key):
            raise ValueError(
                f"task.{key} = {value} is a setting of {' and '.join(owners)}, but task.name = {task.name}: set that "
                f"to {' or '.join(owners)}, or drop this"
            )


def to_yaml(config: Config) -> str:
    """YAML text that `load_config` reads back to an equal config."""
    return str(yaml.dump(to_plain(config), Dumper=DUMPER, sort_keys=False))


def to_plain(config: Config) -> dict[str, Any]:
    """The same as nested mappings, lists, numbers and texts."""
    plain: dict[str, Any] = TypeAdapter(Config).dump_python(config, mode="json")
    return plain


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs differ, each with both values."""
    found = {}
    for key in all_keys(Config):
        values = [functools.reduce(getattr, key.split("."), config) for config in (one, other)]
        if values[0] != values[1]:
            found[key] = (values[0], values[1])
    return found
