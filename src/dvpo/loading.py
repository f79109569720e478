"""Where a run's config comes from, and which settings suit which row.

A config is made of, from weak to strong: the defaults, those of the embedded task, the defaults of the chosen
algorithm's row, the YAML file, `key.sub=value` overrides of the command line.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dvpo.algorithms import Algorithm, find_algorithm
from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.kinds import refuse_study
from dvpo.nested import checked, deep_copy, merge, one_sentence, read_yaml, set_dotted
from dvpo.settings import SamplingConfig

TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "dialogue": {"sampling": {"max_prompt_length": 128, "max_completion_length": 256}},
    "reasoning_gym": {"sampling": {"max_prompt_length": 1024, "max_completion_length": 1024}},
}
"""Tasks that the defaults of the sections do not fit: a conversation is longer than an answer."""
OF_ANY_NOISE = ("then", "low", "high")
"""Settings of `noise` that say something without a kind."""


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Make a validated `Config`, one that suits its row.

    Args:
        source: a YAML file, a nested mapping, or None for the defaults.
        overrides: `key.sub=value` strings, values read as YAML; the last one wins.

    Raises:
        InputError: unreadable file, a study, unknown key (with the nearest known one), value out of range, or one that
            the algorithm has no use for.
    """
    if isinstance(source, str | Path):
        values = read_yaml(source)
        refuse_study(source, values)
    else:
        values = deep_copy(source or {})
    for override in overrides:
        set_dotted(values, override)
    values = checked(values, Config, Config)
    noise = values.get("noise", {})
    if "kind" not in noise and (named := [key for key in noise if key not in OF_ANY_NOISE]):
        raise InputError(
            f"noise.{named[0]} = {noise[named[0]]} belongs to a kind of noise: set noise.kind (docs/noise.md)"
        )
    name = values.get("algorithm", Config.algorithm)
    if not isinstance(name, str):
        raise InputError(f"algorithm = {name!r} is not a name: take a row such as dvpo or ppo")
    merged = merge(merge(_task_defaults(values.get("task", {})), find_algorithm(name).defaults), values)
    try:
        config = TypeAdapter(Config).validate_python(merged)
    except ValidationError as error:
        raise InputError(one_sentence(error)) from None
    suited_row(config)
    return config


def suited_row(config: Config) -> Algorithm:
    """The row that a config names.

    Raises:
        InputError: no such row, or a setting that it has no use for.
    """
    row = find_algorithm(config.algorithm)
    complaint = next(itertools.chain(_unsuited(row, config), _corrections(config)), None)
    if complaint is not None:
        raise InputError(complaint)
    return row


def _task_defaults(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a mix: the largest of each length limit."""
    if task.get("name") != "mix" or not isinstance(task.get("mix"), list | tuple):
        return TASK_DEFAULTS.get(str(task.get("name")), {})
    parts = [part.get("name") for part in task["mix"] if isinstance(part, Mapping)]
    limits = [TASK_DEFAULTS.get(str(name), {}).get("sampling", {}) for name in parts]
    lengths = ("max_prompt_length", "max_completion_length")
    usual = {key: getattr(SamplingConfig, key) for key in lengths}
    return {"sampling": {key: max((own.get(key, usual[key]) for own in limits), default=usual[key]) for key in lengths}}


# What does not suit a row


def _unsuited(row: Algorithm, config: Config) -> Iterator[str]:
    compares = f"algorithm = {config.algorithm}" if row.compares_group else f"reward.norm = {config.reward.norm}"
    if config.sampling.samples_per_prompt == 1 and (row.compares_group or config.reward.norm.startswith("group")):
        yield (
            f"{compares} compares the responses to one prompt, but sampling.samples_per_prompt = 1, so nothing "
            "would be learnt: raise it, or take another"
        )
    if config.critic.adaptive_risk and not row.uses_critic_terms:
        yield (
            f"critic.adaptive_risk = true moves the tail terms, which algorithm = {config.algorithm} does not have: "
            "set it to false"
        )
    if not row.has_critic:
        yield from _without_critic(config)
    else:
        yield from _unsuited_critic(row, config)
    if row.has_law:
        yield from _unsuited_rank(config)
    else:
        yield from _without_law(config)


def _without_critic(config: Config) -> Iterator[str]:
    algorithm, advantage = f"algorithm = {config.algorithm}", config.advantage
    if config.update.actor_warmup_steps:
        yield (
            f"update.actor_warmup_steps = {config.update.actor_warmup_steps} lets the critic learn alone, "
            f"but {algorithm} has no critic: set it to 0"
        )
    if "value" in config.alarms.stop:
        yield f"alarms.stop names value, which cannot ring: {algorithm} has no critic; drop it"
    if advantage.law.functional == "denoised":
        yield (
            f"advantage.law.functional = denoised trims a critic's law, but {algorithm} has no critic: set "
            "reward.correction instead"
        )
    for key in ("truncation", "missing_reward"):
        if getattr(advantage, key) == "bootstrap":
            yield f"advantage.{key} = bootstrap asks a critic, but {algorithm} has none: set it to mask"
    if advantage.delta_clip is not None:
        yield (
            f"advantage.delta_clip = {advantage.delta_clip:g} clips differences of a critic's values, but {algorithm} "
            "has no critic: set it to null, or bound the reward with reward.clip"
        )


def _unsuited_critic(row: Algorithm, config: Config) -> Iterator[str]:
    critic = config.critic
    if row.uses_critic_terms and critic.weights.needs_tails() and critic.num_quantiles < 3:
        yield (
            f"critic.num_quantiles = {critic.num_quantiles} is too few for tail terms: take at least 3, or set the "
            "tail weights under critic.weights to 0"
        )
    learns = {"vocabulary": "one of tokens", "categorical": "a histogram"}.get(row.critic)
    if learns and critic.start == "verdict":
        yield (
            f"critic.start = verdict is a value of states, and algorithm = {config.algorithm} learns {learns}: set it "
            "to random"
        )
    if critic.adaptive_risk and not any(asdict(replace(critic.weights, consistency=0.0)).values()):
        yield (
            "critic.adaptive_risk = true moves the tail terms, whose weights are 0 with algorithm = "
            f"{config.algorithm}: set critic.weights, or take dvpo_paper"
        )


def _unsuited_rank(config: Config) -> Iterator[str]:
    advantage = config.advantage
    if advantage.law.functional != "rank":
        return
    if advantage.target == "mixture" and (advantage.reward_trust < 1 or advantage.doubt_steps):
        yield (
            "advantage.reward_trust below 1 moves the atoms of a rank one by one, which advantage.target = mixture "
            "draws anew: take indexwise targets, or the mean"
        )
    if advantage.delta_clip is not None:
        yield (
            f"advantage.delta_clip = {advantage.delta_clip:g} clips nothing in a rank, which is bounded: "
            "set it to null, or take another advantage.law.functional"
        )


def _without_law(config: Config) -> Iterator[str]:
    """A row whose critic gives numbers has no law to make one of; `denoised` takes a number too."""
    functional = config.advantage.law.functional
    unread = {
        f"advantage.law.functional = {functional}": functional not in ("mean", "denoised"),
        "advantage.target = mixture": config.advantage.target == "mixture",
    }
    for setting in (setting for setting, on in unread.items() if on):
        yield (
            f"{setting} reads a law of returns, which algorithm = {config.algorithm} does not learn: drop it, or "
            "take a row with quantiles, such as dvpo"
        )


# What takes noise out


def _corrections(config: Config) -> Iterator[str]:
    """Complaints: rates have to come from somewhere, and noise is taken out once, of rewards that are 0 or 1."""
    reward, rates = config.reward, config.reward.rates
    denoised = config.advantage.law.functional == "denoised"
    if reward.correction != "none" and denoised:
        yield (
            f"reward.correction = {reward.correction} and advantage.law.functional = denoised both take the noise "
            "out: keep one of them"
        )
    users = {
        "advantage.law.functional = denoised": denoised,
        f"reward.correction = {reward.correction}": reward.correction != "none",
        "critic.adaptive_risk = true": config.critic.adaptive_risk,
    }
    using = [setting for setting, on in users.items() if on]
    if using and not (reward.trusted or rates.given):
        yield f"{using[0]} needs rates: set reward.trusted, to 0.05 say, and they are estimated, or give reward.rates"
    if rates.given and not using:
        yield (
            "reward.rates are used by nothing: set reward.correction, advantage.law.functional or "
            "critic.adaptive_risk, or drop them"
        )
    forward_alone = using == ["reward.correction = forward"]
    wanted = ("false_negative",) if forward_alone else ("false_positive", "false_negative")
    if rates.given and (unknown := [name for name in wanted if getattr(rates, name) is None]):
        yield f"{using[0]} needs reward.rates.{unknown[0]} too: set it, to 0 if there are none"
    if using and [part.weight for part in reward.mix] not in ([], [1.0]):
        yield f"{using[0]} takes rewards that are 0 or 1, and reward.mix weighs and adds: drop one of them"
    if not denoised:
        return
    if config.advantage.recentre:
        yield (
            "advantage.recentre = true shifts values that advantage.law.functional = denoised reads as "
            "probabilities: set it to false"
        )
    shaped = {
        f"reward.overlong = {reward.overlong}": reward.overlong > 0,
        f"reward.norm = {reward.norm}": reward.norm != "none",
        f"reward.clip = {reward.clip}": reward.clip is not None,
        f"reward.floor = {reward.floor}": reward.floor is not None,
        "actor.kl.place = reward": config.actor.kl.place == "reward" and config.actor.kl.coef > 0,
        "advantage.truncation = bootstrap": config.advantage.truncation == "bootstrap",
    }
    if changed := [setting for setting, on in shaped.items() if on]:
        yield (
            f"advantage.law.functional = denoised reads a value as the probability of an observed 1, which "
            f"{' and '.join(changed)} would change: switch that off"
        )
