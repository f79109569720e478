"""Evaluation: a policy and a task's split -> one row an item, and a summary with intervals."""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dvpo.checkpoint import checkpoint_step
from dvpo.config import Config
from dvpo.distributed import gather_rows, is_main, share
from dvpo.durable import output_file, write_atomically
from dvpo.encoding import ChatEncoder, fit_prompts, within_context
from dvpo.environments import environment_at
from dvpo.errors import InputError
from dvpo.faults import fault_rows, lost_in_evaluation
from dvpo.loading import load_config
from dvpo.plain_text import interval, table_console
from dvpo.policy import Policy
from dvpo.rewards import Scores
from dvpo.runlog import json_line, unused
from dvpo.sampling import Episode, HuggingFaceSampler, Sampler, play_draws
from dvpo.scoring import Scorer, open_reward
from dvpo.seeding import derive_seed
from dvpo.settings import SamplingConfig
from dvpo.stats import bootstrap_interval, wilson_interval
from dvpo.tasks import Environment, Example, Message, Task, total
from dvpo.tasks.mixture import each_of_its_tasks, held_out
from dvpo.tasks.named import make_task
from dvpo.trained import open_trained, refuse_what_python_gave, sound_checkpoint

Judge = Callable[[Sequence[Episode]], Scores]
CORRECT = 1 - 1e-6
"""A reward from here on counts as a solved item (the verifiers give 0 or 1)."""
DRAWS = 8
"""An item, in `dvpo eval`, where neither the command nor the config says how many."""
OURS = frozenset(
    (
        *("accuracy", "completion", "id", "in_split", "items", "messages", "prompt", "reward", "samples", "split"),
        *("truncated", "unknown"),
    )
)
"""Names in rows and summaries that no environment may give to a figure of its own."""


@dataclass(frozen=True)
class Evaluation:
    """The result on one split."""

    summary: dict[str, float]
    """`accuracy` (greedy: share solved) with `accuracy_low`, `accuracy_high` (Wilson, 95%), `reward` (greedy mean),
    `truncated`; greedy means of the environments' own figures (dialogue: `tcr`, `acr`, `gcr`) and with k draws
    `mean@k`, with bootstrap intervals over prompts; `pass@k` and `pass^k` with Wilson's."""
    rows: list[dict[str, Any]]
    """One an item: id, prompt, greedy completion, its reward and whether it was cut, rewards of the draws."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """One a fault of the reward, as `faults.jsonl` shows it."""


def fitting_examples(task: Task, split: str, config: Config, policy: Policy) -> list[Example]:
    """The first `evaluation.prompts` examples of a split, less those that `sampling.long_prompts: skip` leaves out.

    Raises:
        InputError: a prompt that is too long where none may be, or none that fits.
    """
    examples = task.split(split)[: config.evaluation.prompts]
    encoder = ChatEncoder(policy.tokenizer, policy.template)
    fitting = fit_prompts(examples, encoder, config.sampling, policy.context_length, split)
    kept = [example for example in examples if example.id in fitting]
    left_out = len(examples) - len(kept)
    if left_out and is_main():
        warnings.warn(
            f"sampling.long_prompts = skip: {left_out} of {len(examples)} prompts of {split} are longer than "
            f"sampling.max_prompt_length = {config.sampling.max_prompt_length} and count in no evaluation",
            stacklevel=2,
        )
    return kept


def evaluate(
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    judge: Judge,
    settings: SamplingConfig,
    samples: int,
    seed: int,
    drawer: Callable[[bool], Sampler] | None = None,
) -> Evaluation:
    """Answer every example greedily and `samples` times at the sampling temperature; each process answers its share.

    Args:
        policy: the one that answers.
        task: makes the environments.
        examples: the items; draws are keyed by (seed, item, draw), so an item's do not depend on the others.
        judge: rewards of finished episodes, None where unknown, and faults; an unknown reward counts in no figure.
        settings: lengths, temperature and stops as in training; over-long prompts keep their last tokens.
        samples: k; 0 = greedy only.
        seed: of the draws.
        drawer: greedy or not -> who draws; None: the policy itself.
    """

    own = [examples[place] for place in share(len(examples))]
    mine, faults = _answers(policy, task, own, judge, settings, samples, seed, drawer) if own else ([], [])
    items = gather_rows(mine)
    summary = _greedy_summary(items)
    names = dict.fromkeys(name for item in items for name in item.own)
    summary |= _with_intervals({n: np.array([item.own[n] for item in items if n in item.own]) for n in names})
    if samples:
        summary |= _sampled_summary(np.array([item.drawn for item in items]))
    return Evaluation(summary, [_row(item, samples) for item in items], gather_rows(faults))


@dataclass(frozen=True)
class _Item:
    """How one example was answered."""

    example: Example
    completion: str
    terminated: bool
    conversation: dict[str, list[Message]]
    """All that was said, where that is more than the completion."""
    reward: float
    """Of the greedy answer; NaN where unknown."""
    own: dict[str, float]
    """The environment's figures."""
    drawn: list[float]
    """Rewards of the draws."""


def _answers(
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    judge: Judge,
    settings: SamplingConfig,
    samples: int,
    seed: int,
    drawer: Callable[[bool], Sampler] | None,
) -> tuple[list[_Item], list[dict[str, Any]]]:
    """How the examples were answered, and the faults of their rewards."""
    faults: list[dict[str, Any]] = []

    def rewards_of(episodes: Sequence[Episode]) -> np.ndarray:
        scores = judge(episodes)
        faults.extend(fault_rows(scores.faults, episodes))
        return np.array([total(reward) for reward in scores.rewards]).reshape(len(examples), -1)

    greedy, environments = take(policy, task, examples, settings, 1, seed, greedy=True, drawer=drawer)
    rewards, figures = rewards_of(greedy)[:, 0], own_figures(greedy, environments)
    drawn: list[list[float]] = [[] for _ in examples]
    if samples:
        drawn = rewards_of(take(policy, task, examples, settings, samples, seed, drawer=drawer)[0]).tolist()
    items = [
        _Item(e.example, e.text, e.terminated, e.conversation(), float(reward), own, of_draws)
        for e, reward, own, of_draws in zip(greedy, rewards, figures, drawn, strict=True)
    ]
    return items, faults


def _row(item: _Item, samples: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": item.example.id, "prompt": item.example.prompt, "completion": item.completion}
    row |= {"reward": _known(item.reward), "truncated": not item.terminated, **item.conversation, **item.own}
    return row | {"samples": [_known(reward) for reward in item.drawn]} if samples else row


def take(
    policy: Policy,
    task: Task,
    examples: Sequence[Example],
    settings: SamplingConfig,
    count: int,
    seed: int,
    greedy: bool = False,
    drawer: Callable[[bool], Sampler] | None = None,
) -> tuple[list[Episode], list[Environment]]:
    """Take every example `count` times, greedily or not; the finished episodes and where they took place."""
    encoder, settings = ChatEncoder(policy.tokenizer, policy.template), within_context(settings, policy.context_length)
    prompts = {e.id: encoder.prompt(e.prompt)[-settings.max_prompt_length :] for e in examples}
    sampler = drawer(greedy) if drawer else HuggingFaceSampler(policy, settings, greedy=greedy)
    draws = [(example, 0) for example in examples]
    return play_draws(task, draws, count, prompts, encoder, sampler, settings, derive_seed(seed, "evaluation"))


def own_figures(episodes: Sequence[Episode], environments: Sequence[Environment]) -> list[dict[str, float]]:
    """The figures that each environment keeps of its finished episode, less those that are None or not finite; none of
    one that raised something.

    Raises:
        InputError: a name that is ours, or no number.
    """
    return [
        _figures(episode.example, environment) if hasattr(environment, "figures") and not episode.fault else {}
        for episode, environment in zip(episodes, environments, strict=True)
    ]


def _figures(example: Example, environment: Any) -> dict[str, float]:
    with environment_at(example):
        given = {str(name): value for name, value in environment.figures().items() if value is not None}
    said = f"task: figures() of the environment of prompt {example.id}"
    if taken := [name for name in given if name in OURS or re.search(r"[/@^]|_(low|high)$", name)]:
        raise InputError(f"{said} names {taken[0]!r}, as evaluations name what is theirs: rename it")
    figures = {}
    for name, value in given.items():
        try:
            figures[name] = float(value)
        except (TypeError, ValueError):
            raise InputError(f"{said} gives {name} = {value!r:.60}: give a number, or None if it has none") from None
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _greedy_summary(items: Sequence[_Item]) -> dict[str, float]:
    rewards = np.array([item.reward for item in items])
    known = rewards[np.isfinite(rewards)]
    solved = int((known >= CORRECT).sum())
    low, high = wilson_interval(solved, len(known))
    return {
        "items": len(known),
        "unknown": len(rewards) - len(known),
        "accuracy": solved / len(known) if len(known) else float("nan"),
        "accuracy_low": low,
        "accuracy_high": high,
        "reward": float(known.mean()) if len(known) else float("nan"),
        "truncated": float(np.mean([not item.terminated for item in items])),
    }


def _sampled_summary(rewards: np.ndarray) -> dict[str, float]:
    """mean@k, pass@k (some draw solves it) and pass^k (all do) over the items all of whose draws have a reward."""
    rewards = rewards[np.isfinite(rewards).all(axis=1)]
    if not len(rewards):
        return {}
    k = rewards.shape[1]
    solved = (rewards >= CORRECT).sum(axis=1)
    summary = _with_intervals({f"mean@{k}": solved / k})
    # With k of k draws these are shares of items, for which Wilson's interval is sound where all or none succeed.
    for name, succeeded in ((f"pass@{k}", solved > 0), (f"pass^{k}", solved == k)):
        low, high = wilson_interval(int(succeeded.sum()), len(succeeded))
        summary |= {name: float(succeeded.mean()), f"{name}_low": low, f"{name}_high": high}
    return summary


def _with_intervals(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each over the items, with its bootstrap interval."""
    summary: dict[str, float] = {}
    for name, values in scores.items():
        low, high = bootstrap_interval(lambda rows: float(np.mean(rows[0])), values)
        summary |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return summary


def _known(reward: float) -> float | None:
    return float(reward) if np.isfinite(reward) else None


def evaluate_checkpoint(
    source: str | Path, overrides: Sequence[str], splits: Sequence[str] | None, samples: int | None, output: str | None
) -> Path:
    """Evaluate a run's checkpoint on its own task, print the summary, and write it and one JSONL row an item.

    Args:
        source: a run folder (its newest sound checkpoint is taken) or a `checkpoint-N` folder in one.
        overrides: `key.sub=value` settings that win over the run's config.
        splits: splits of the task; None: `id` and `ood`, if it has them, of each task of a mix.
        samples: draws an item, 0 = greedy only; None: `evaluation.samples`, or 8 where that is 0.
        output: the rows' file; None: `evaluation-N.jsonl` in the run folder, `evaluation-N-2.jsonl` where there is one.

    Returns:
        The rows' file; the summary stands beside it, with the ending `.json`.

    Raises:
        InputError: no run, no sound checkpoint, no such split, a prompt that is too long, a task given in Python.
    """
    checkpoint = sound_checkpoint(source)
    config = load_config(checkpoint.parent / "config.yaml", overrides)
    refuse_what_python_gave(checkpoint, config, "task")
    samples = config.evaluation.samples or DRAWS if samples is None else samples
    if samples < 0:
        raise InputError(f"--samples = {samples} is negative: take 0 for greedy only")
    task = make_task(config.task)
    if not getattr(task, "knows_truth", True):
        refuse_what_python_gave(checkpoint, config, "reward")
    splits = held_out(task) if splits is None else [own for name in splits for own in each_of_its_tasks(task, name)]
    if not splits:
        raise InputError(
            f"the task {task.name} holds no examples out to be judged by: give it some (task.held_out, task.id_path), "
            "or take --splits train"
        )
    missing = [split for split in splits if not task.split(split)]
    if missing:
        raise InputError(
            f"--splits {' '.join(missing)}: the task {task.name} has no such examples; take "
            f"{', '.join(['train', *held_out(task)])}"
        )
    policy = open_trained(checkpoint, config)
    unnamed = unused(checkpoint.parent, f"evaluation-{checkpoint_step(checkpoint)}", ".jsonl", ".json")
    file = output_file(output or unnamed, "--output")
    about = file.with_suffix(".json")
    if about == file:
        raise InputError(f"--output = {file} is the name of its summary: name a file that ends in .jsonl")
    if taken := [path for path in (file, about) if path.exists()]:
        raise InputError(f"--output = {file}: {taken[0]} exists: name a new file")
    examples = {split: fitting_examples(task, split, config, policy) for split in splits}
    rows, results = [], {}
    reward = open_reward(config, task)
    with closing(reward) if reward else nullcontext():
        judge = Scorer(task, reward).judge
        for split in splits:
            results[split] = evaluate(policy, task, examples[split], judge, config.sampling, samples, config.seed)
            rows += [{"split": split, **row} for row in results[split].rows]
    sizes = {split: len(task.split(split)) for split in splits}
    summaries = {split: {"in_split": sizes[split], **result.summary} for split, result in results.items()}
    story = {"checkpoint": str(checkpoint), "overrides": list(overrides), "k": samples, "splits": summaries}
    write_atomically(file, map(json_line, rows))
    write_atomically(about, [json_line(story)])
    console = table_console()
    console.print(_table(results, sizes, f"{checkpoint}: % of held-out items solved, 95% intervals in brackets"))
    if said := lost_in_evaluation([row for result in results.values() for row in result.faults]):
        console.print(said, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"items: {file}, summary: {about}", soft_wrap=True)
    return file


def _table(results: Mapping[str, Evaluation], sizes: Mapping[str, int], title: str) -> Table:
    """A row a split, a column a figure that has an interval, and the greedy answers that were cut; of one's own figures
    those that are shares are in per cent. `sizes`: how many items each split has, asked or not."""
    summaries = [result.summary for result in results.values()]  # the tasks of a mix have figures of their own
    names = dict.fromkeys(name for figures in summaries for name in figures if f"{name}_low" in figures)
    rows = [row for result in results.values() for row in result.rows]  # which hold no figure of ours that is drawn
    shares = {name for name in names if all(0 <= row.get(name, 0) <= 1 for row in rows)}
    table = Table(title=title)
    for column in ("split", "items", *(name.replace("accuracy", "greedy accuracy") for name in names), "cut"):
        table.add_column(column, justify="right")
    for split, result in results.items():
        known, asked = result.summary["items"], len(result.rows)
        items = str(asked) if known == asked else f"{known} known of {asked}"
        items += f" of {sizes[split]}" if asked < sizes[split] else ""
        texts = (interval_text(result.summary, name, percent=name in shares) for name in names)
        cut = f"{100 * result.summary['truncated']:.1f}"
        table.add_row(split, items, *texts, cut)
    return table


def interval_text(figures: Mapping[str, float], name: str, percent: bool = True) -> str:
    """`45.3 [39, 51]`, from a summary's figures `name`, `name_low`, `name_high`; `percent`: whether it is a share."""
    return interval(*(figures.get(name + end) for end in ("", "_low", "_high")), share=percent)
