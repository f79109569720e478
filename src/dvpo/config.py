"""One run's config: frozen dataclasses, validated when made; YAML in, YAML out.

Its sections stand in `dvpo.settings` and `dvpo.settings_learning`; what one says about another is checked here. A
config is made of, from weak to strong: the defaults, those of the embedded task, the defaults of the chosen algorithm's
row, the YAML file, `key.sub=value` overrides of the command line.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dvpo.algorithms import find_algorithm
from dvpo.errors import InputError
from dvpo.nested import all_keys, checked, deep_copy, merge, one_sentence, read_yaml, set_dotted
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

TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "dialogue": {"sampling": {"max_prompt_length": 128, "max_completion_length": 256}},
    "reasoning_gym": {"sampling": {"max_prompt_length": 1024, "max_completion_length": 1024}},
}
"""Tasks that the defaults below do not fit: a conversation is longer than an answer."""

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The same text, much faster where PyYAML has its C part: a study writes the config of every cell at its start."""

OF_FILES = ("path", "id_path", "ood_path", "prompt_column", "held_out", "truth", "answer_pattern")
TASKS_WITH = {
    "ood": ("science", "dialogue"),
    **dict.fromkeys(("generators", "ood_generators"), ("reasoning_gym",)),
    **dict.fromkeys(OF_FILES, ("files",)),
}
"""Setting of `task` -> the tasks that read it."""
OF_ANY_NOISE = ("then", "low", "high")
"""Settings of `noise` that say something without a kind."""


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
        row = find_algorithm(self.algorithm)
        tails = row.uses_critic_terms and self.critic.weights.needs_tails()
        if tails and self.critic.num_quantiles < 3:
            raise ValueError(
                f"critic.num_quantiles = {self.critic.num_quantiles} is too few for tail terms: "
                "take at least 3, or set the tail weights under critic.weights to 0"
            )
        learns = {"vocabulary": "one of tokens", "categorical": "a histogram"}.get(row.critic)
        if learns and self.critic.start == "verdict":
            raise ValueError(
                f"critic.start = verdict is a value of states, and algorithm = {self.algorithm} learns {learns}: "
                "set it to random"
            )
        if self.distributed.strategy == "fsdp" and self.critic.verdict_only_steps:
            raise ValueError(
                f"critic.verdict_only_steps = {self.critic.verdict_only_steps} lets a part of the critic learn alone, "
                "which distributed.strategy = fsdp cannot: set it to 0, or take ddp"
            )
        if self.critic.adaptive_risk and not row.uses_critic_terms:
            raise ValueError(
                f"critic.adaptive_risk = true moves the tail terms, which algorithm = {self.algorithm} does not have: "
                "set it to false"
            )
        if self.critic.adaptive_risk and not any(asdict(replace(self.critic.weights, consistency=0.0)).values()):
            raise ValueError(
                "critic.adaptive_risk = true moves the tail terms, whose weights are 0 with algorithm = "
                f"{self.algorithm}: set critic.weights, or take dvpo_paper"
            )
        compares = "algorithm = " + self.algorithm if row.compares_group else f"reward.norm = {self.reward.norm}"
        if self.sampling.samples_per_prompt == 1 and (row.compares_group or self.reward.norm.startswith("group")):
            raise ValueError(
                f"{compares} compares the responses to one prompt, but sampling.samples_per_prompt = 1, so nothing "
                "would be learnt: raise it, or take another"
            )
        if (
            row.has_law
            and self.advantage.law.functional == "rank"
            and self.advantage.target == "mixture"
            and (self.advantage.reward_trust < 1 or self.advantage.doubt_steps)
        ):
            raise ValueError(
                "advantage.reward_trust below 1 moves the atoms of a rank one by one, which advantage.target = mixture "
                "draws anew: take indexwise targets, or the mean"
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
        if self.update.actor_warmup_steps and not row.has_critic:
            raise ValueError(
                f"update.actor_warmup_steps = {self.update.actor_warmup_steps} lets the critic learn alone, "
                f"but algorithm = {self.algorithm} has no critic: set it to 0"
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
        silent = {}
        if not row.has_critic:
            silent["value"] = f"algorithm = {self.algorithm} has no critic; drop it"
        # Measured before each minibatch's own update: the first sees the sampling policy itself.
        if self.update.epochs * self.update.minibatches == 1 and not self.alarms.kl_reference:
            silent["kl"] = (
                "a step of one update (update.epochs, update.minibatches) is measured before it; drop it, or set "
                "alarms.kl_reference and actor.kl.coef"
            )
        if cannot := [name for name in self.alarms.stop if name in silent]:
            raise ValueError(f"alarms.stop names {cannot[0]}, which cannot ring: {silent[cannot[0]]}")
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
        self._check_corrections()
        for key in ("truncation", "missing_reward"):
            if getattr(self.advantage, key) == "bootstrap" and not row.has_critic:
                raise ValueError(
                    f"advantage.{key} = bootstrap asks a critic, but algorithm = {self.algorithm} has none: "
                    "set it to mask"
                )
        if self.advantage.delta_clip is not None and not row.has_critic:
            raise ValueError(
                f"advantage.delta_clip = {self.advantage.delta_clip:g} clips differences of a critic's values, but "
                f"algorithm = {self.algorithm} has no critic: set it to null, or bound the reward with reward.clip"
            )
        if self.advantage.delta_clip is not None and row.has_law and self.advantage.law.functional == "rank":
            raise ValueError(
                f"advantage.delta_clip = {self.advantage.delta_clip:g} clips nothing in a rank, which is bounded: "
                "set it to null, or take another advantage.law.functional"
            )

        if not row.has_law:
            self._check_no_law()

    def _check_no_law(self) -> None:
        """A row whose critic gives numbers has no law to make one of; `denoised` takes a number too."""
        functional = self.advantage.law.functional
        unread = {
            f"advantage.law.functional = {functional}": functional not in ("mean", "denoised"),
            "advantage.target = mixture": self.advantage.target == "mixture",
        }
        if asked := [setting for setting, on in unread.items() if on]:
            raise ValueError(
                f"{asked[0]} reads a law of returns, which algorithm = {self.algorithm} does not learn: drop it, or "
                "take a row with quantiles, such as dvpo"
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

    def _check_corrections(self) -> None:
        """Rates have to come from somewhere, and noise is taken out once, of rewards that are 0 or 1."""
        reward, rates = self.reward, self.reward.rates
        denoised = self.advantage.law.functional == "denoised"
        if reward.correction != "none" and denoised:
            raise ValueError(
                f"reward.correction = {reward.correction} and advantage.law.functional = denoised both take the noise "
                "out: keep one of them"
            )
        users = {
            "advantage.law.functional = denoised": denoised,
            f"reward.correction = {reward.correction}": reward.correction != "none",
            "critic.adaptive_risk = true": self.critic.adaptive_risk,
        }
        using = [setting for setting, on in users.items() if on]
        if using and not (reward.trusted or rates.given):
            raise ValueError(
                f"{using[0]} needs rates: set reward.trusted, to 0.05 say, and they are estimated, or give reward.rates"
            )
        if rates.given and not using:
            raise ValueError(
                "reward.rates are used by nothing: set reward.correction, advantage.law.functional or "
                "critic.adaptive_risk, or drop them"
            )
        forward_alone = using == ["reward.correction = forward"]
        wanted = ("false_negative",) if forward_alone else ("false_positive", "false_negative")
        if rates.given and (unknown := [name for name in wanted if getattr(rates, name) is None]):
            raise ValueError(f"{using[0]} needs reward.rates.{unknown[0]} too: set it, to 0 if there are none")
        if using and [part.weight for part in reward.mix] not in ([], [1.0]):
            raise ValueError(
                f"{using[0]} takes rewards that are 0 or 1, and reward.mix weighs and adds: drop one of them"
            )
        if denoised and not find_algorithm(self.algorithm).has_critic:
            raise ValueError(
                f"advantage.law.functional = denoised trims a critic's law, but algorithm = {self.algorithm} has no "
                "critic: set reward.correction instead"
            )
        if not denoised:
            return
        if self.advantage.recentre:
            raise ValueError(
                "advantage.recentre = true shifts values that advantage.law.functional = denoised reads as "
                "probabilities: set it to false"
            )
        shaped = {
            f"reward.overlong = {reward.overlong}": reward.overlong > 0,
            f"reward.norm = {reward.norm}": reward.norm != "none",
            f"reward.clip = {reward.clip}": reward.clip is not None,
            "actor.kl.place = reward": self.actor.kl.place == "reward" and self.actor.kl.coef > 0,
            "advantage.truncation = bootstrap": self.advantage.truncation == "bootstrap",
        }
        if changed := [setting for setting, on in shaped.items() if on]:
            raise ValueError(
                f"advantage.law.functional = denoised reads a value as the probability of an observed 1, which "
                f"{' and '.join(changed)} would change: switch that off"
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


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Make a validated `Config`.

    Args:
        source: a YAML file, a nested mapping, or None for the defaults.
        overrides: `key.sub=value` strings, values read as YAML; the last one wins.

    Raises:
        InputError: unreadable file, unknown key (with the nearest known one), value out of range.
    """
    values = read_yaml(source) if isinstance(source, str | Path) else deep_copy(source or {})
    for override in overrides:
        set_dotted(values, override)
    values = checked(values, Config, Config)
    noise = values.get("noise") or {}
    if (
        isinstance(noise, Mapping)
        and "kind" not in noise
        and (named := [key for key in noise if key not in OF_ANY_NOISE])
    ):
        raise InputError(
            f"noise.{named[0]} = {noise[named[0]]} belongs to a kind of noise: set noise.kind (docs/noise.md)"
        )
    name = values.get("algorithm", Config.algorithm)
    if not isinstance(name, str):
        raise InputError(f"algorithm = {name!r} is not a name: take a row such as dvpo or ppo")
    merged = merge(merge(_task_defaults(values.get("task", {})), find_algorithm(name).defaults), values)
    try:
        return TypeAdapter(Config).validate_python(merged)
    except ValidationError as error:
        raise InputError(one_sentence(error)) from None


def _task_defaults(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a mix: the largest of each length limit."""
    if task.get("name") != "mix" or not isinstance(task.get("mix"), list):
        return TASK_DEFAULTS.get(str(task.get("name")), {})
    parts = [part.get("name") for part in task["mix"] if isinstance(part, Mapping)]
    limits = [TASK_DEFAULTS.get(str(name), {}).get("sampling", {}) for name in parts]
    lengths = ("max_prompt_length", "max_completion_length")
    usual = {key: getattr(SamplingConfig, key) for key in lengths}
    return {"sampling": {key: max((own.get(key, usual[key]) for own in limits), default=usual[key]) for key in lengths}}


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
