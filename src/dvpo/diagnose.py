"""`dvpo diagnose`: how noisy the supervision looks, and what follows, before anyone trains."""

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from dvpo.advice import Advice, advise, settings
from dvpo.answers import Answerer
from dvpo.config import Config
from dvpo.diagnosis import Agreement, ErrorRate, Findings, Sheet, find
from dvpo.durable import output_file, write_atomically
from dvpo.errors import InputError
from dvpo.noise import NO_NOISE, Noise, make_noise
from dvpo.plain_text import percent
from dvpo.prompts import PromptStream
from dvpo.reward_mix import RewardMix
from dvpo.rewards import Fault, RewardSource, headline
from dvpo.sampling import Episode
from dvpo.scoring import Scorer, open_reward, open_source
from dvpo.seeding import derive_seed
from dvpo.settings import RewardConfig
from dvpo.tasks.named import make_task


@dataclass(frozen=True)
class Effort:
    """How much is sampled and scored."""

    prompts: int = 64
    samples: int = 8
    """Answers a prompt."""
    repeats: int = 2
    """Scorings of each answer; 1: the reward cannot differ, or costs too much."""


def diagnose_file(
    config: Config, effort: Effort, others: Sequence[str], output: str | Path | None, console: Console
) -> Path | None:
    """Diagnose, print what was found and what follows, and write it as JSON if asked.

    Args:
        config: names model, task, sampling, reward, noise and seed.
        effort: how much.
        others: further rewards to compare with, as `reward.function` names them.
        output: the JSON file.
        console: shows progress and result.

    Raises:
        InputError: a number out of range, a folder that is not there, or whatever is wrong with model, task or reward.
    """
    for name, least in (("prompts", 1), ("samples", 2), ("repeats", 1)):
        if (number := getattr(effort, name)) < least:
            raise InputError(f"--{name} = {number} is too few: take at least {least}")
    file = None if output is None else output_file(output, "--json")
    findings = find(fill_sheet(config, effort, others, console))
    advice = advise(findings, config)
    print_findings(findings, console)
    print_advice(advice, console)
    if file is not None:
        rows = {"findings": asdict(findings), "advice": [asdict(one) for one in advice], "settings": settings(advice)}
        write_atomically(file, [(json.dumps(rows, indent=1) + "\n").encode()])
        console.print(f"diagnosis: {file}", soft_wrap=True)
    return file


def fill_sheet(config: Config, effort: Effort, others: Sequence[str] = (), console: Console | None = None) -> Sheet:
    """Sample answers of the starting model to training prompts, and score them.

    Prompts are drawn by the seed. A repeated scoring counts as another visit of the same answer, so that noise that is
    drawn anew for each judgement differs, and noise that belongs to a prompt or a text stays.
    """
    task = make_task(config.task)
    with ExitStack() as opened:

        def scorer(source: RewardSource | RewardMix | None, noise: Noise = NO_NOISE) -> Scorer:
            if source is not None:
                opened.enter_context(closing(source))
            return Scorer(task, source, noise)

        main = scorer(open_reward(config, task), make_noise(config.noise, config.seed, task.split("train")))
        further = {
            name: scorer(open_source(config, task, function, "reward.function"))
            for name, function in _further(config.reward, others).items()
        }
        answerer = Answerer(config, task, purpose="diagnosis")
        episodes = _answers(answerer, config, effort, console)
        shape = (-1, effort.samples)
        repeats = [main([replace(e, visit=visit) for e in episodes]) for visit in range(effort.repeats)]
        faulty = [_lost(scored.faults, len(episodes)) for scored in repeats]
        return Sheet(
            observed_RPK=np.stack([_array(scored.fields["observed_B"]).reshape(shape) for scored in repeats]),
            true_PK=_array(repeats[0].fields["true_B"]).reshape(shape),
            others_PK={
                name: _array(one(episodes).fields["observed_B"]).reshape(shape) for name, one in further.items()
            },
            lengths_PK=np.array([float(len(e.tokens)) for e in episodes]).reshape(shape),
            truncated_PK=np.array([not e.terminated for e in episodes]).reshape(shape),
            faulty_RPK=np.stack(faulty).reshape(effort.repeats, *shape),
            fault=next((headline(f) for scored in repeats for f in scored.faults if not f.cured), None),
            judged_by_truth=main.reward is None and config.noise.kind == "none" and not config.noise.then,
        )


def _further(reward: RewardConfig, others: Sequence[str]) -> dict[str, str]:
    """The parts of a mix, and what else is asked for, each as a reward by itself."""
    return {part.label: part.function for part in reward.mix} | {name: name for name in others}


def _answers(answerer: Answerer, config: Config, effort: Effort, console: Console | None) -> list[Episode]:
    count = min(effort.prompts, len(answerer.examples))
    drawn = PromptStream(answerer.examples, derive_seed(config.seed, "diagnosis")).next(count)
    examples = [example for example, _ in drawn]
    step = max(1, config.sampling.batch_size // effort.samples)
    hidden = console is None or not console.is_terminal
    starts = track(range(0, count, step), "sampling", console=console, disable=hidden)
    groups = [group for at in starts for group in answerer.answer(examples[at : at + step], effort.samples)]
    return [episode for group in groups for episode in group]


def _lost(faults: Sequence[Fault], size: int) -> Any:
    """Which of the answers lost their score; a fault of the whole batch is no answer's."""
    lost = np.zeros(size, dtype=bool)
    lost[[f.index for f in faults if f.index is not None and not f.cured]] = True
    return lost


def _array(values: Any) -> Any:
    return values.double().numpy()


# What is printed


def print_findings(findings: Findings, console: Console) -> None:
    """One table, a line a finding."""
    table = Table(
        title=f"{findings.prompts} prompts, {findings.samples} answers each, scored {_times(findings.repeats)}"
    )
    table.add_column("finding")
    table.add_column("value", justify="right")
    for name, value in _lines(findings):
        table.add_row(Text(name), Text(value))
    console.print(table)


def _lines(findings: Findings) -> list[tuple[str, str]]:
    scale = "" if findings.within is None else f"{findings.within:.3g} within"
    if findings.between is not None:
        scale += f", {findings.between:.3g} between"
    return [
        ("same score twice", percent(findings.repeat_equal)),
        ("deviation of one answer's scores", _number(findings.repeat_deviation)),
        *([("flips that would explain it", percent(findings.flip))] if findings.flip else []),
        *[(f"agreement with {one.name}", _agreement(one)) for one in findings.agreements],
        ("prompts without signal", percent(findings.silent)),
        ("  by the truth", percent(findings.silent_truth)),
        ("deviation of rewards within and between prompts", scale or "-"),
        ("missing scores", percent(findings.missing)),
        ("  lost to faults", percent(findings.faults)),
        ("mean length (tokens)", f"{findings.length:.1f}"),
        ("answers cut by the length limit", percent(findings.truncated)),
        ("false positives (wrong taken for right)", _rate(findings.false_positive)),
        ("false negatives (right taken for wrong)", _rate(findings.false_negative)),
    ]


def print_advice(advice: Sequence[Advice], console: Console) -> None:
    """A sentence an advice, then all their settings as YAML."""
    console.print("what follows:")
    for number, one in enumerate(advice, 1):
        console.print(f"{number}. {one.sentence}", markup=False, highlight=False)
    if chosen := settings(list(advice)):
        console.print("\n" + yaml.safe_dump(chosen, sort_keys=False), markup=False, highlight=False, soft_wrap=True)


def _agreement(one: Agreement) -> str:
    order = "no pair to order" if one.order is None else f"{percent(one.order)} of {one.pairs} pairs in one order"
    return f"{percent(one.equal)} equal, {order}"


def _rate(rate: ErrorRate | None) -> str:
    if rate is None or not rate.seen:
        return "-"
    return f"{100 * rate.share:.1f}% [{100 * rate.low:.1f}, {100 * rate.high:.1f}] of {rate.seen}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
