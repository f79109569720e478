"""`dvpo label`: majority-vote pseudo-labels, the most frequent final answer of a model to every training prompt.

Zuo et al. 2025, "TTRL: Test-Time Reinforcement Learning", train on such labels. What is written is what
`noise: {kind: pseudo_labels, path: labels.jsonl}` reads.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dvpo.answers import Answerer
from dvpo.config import Config
from dvpo.durable import output_file, write_atomically
from dvpo.errors import InputError
from dvpo.evaluate import CORRECT
from dvpo.plain_text import interval
from dvpo.sampling import Episode
from dvpo.stats import wilson_interval
from dvpo.tasks import Answer, HasFinalAnswer
from dvpo.tasks.named import make_task


@dataclass(frozen=True)
class Label:
    """What the samples of one prompt agree on."""

    id: str
    answer: Answer | None
    """None: no sample had a final answer."""
    votes: int
    samples: int
    correct: bool | None = None
    """What the task's verifier says of the answer; None: there is no answer, or the truth is not known."""

    @property
    def agreement(self) -> float:
        """Share of the samples that gave the answer; samples without a final answer count as dissent."""
        return self.votes / self.samples

    def row(self, knows_truth: bool) -> dict[str, Any]:
        row = {"id": self.id, "answer": self.answer, "votes": self.votes, "samples": self.samples}
        return {**row, "agreement": self.agreement, **({"correct": self.correct} if knows_truth else {})}


def vote(answers: Sequence[Answer | None]) -> tuple[Answer | None, int]:
    """The most frequent answer with its votes; of equally frequent ones the first seen. None abstains."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts.items(), key=lambda item: item[1], default=(None, 0))  # a Counter keeps the order of first sight


class Labeller:
    """Makes the labels of a config's training prompts with its starting model.

    Args:
        config: its task must know what a final answer is.
        samples: answers a prompt.

    Raises:
        InputError: a task without final answers, or whatever is wrong with model or prompts.
    """

    def __init__(self, config: Config, samples: int) -> None:
        task = make_task(config.task)
        if not isinstance(task, HasFinalAnswer):
            raise InputError(
                f"task.name = {config.task.name} cannot be labelled, since its responses have no final answer to vote "
                "on: take math, science or files, or give the task a method final_answer(text)"
            )
        self.task, self.samples = task, samples
        self.knows_truth = getattr(task, "knows_truth", True)
        self.answerer = Answerer(config, task, purpose="labels")
        self.examples = self.answerer.examples

    def label(self, first: int, last: int) -> list[Label]:
        """The labels of the prompts `first` to `last - 1`: the same whatever the range they are made in."""
        return [self._label(episodes) for episodes in self.answerer.answer(self.examples[first:last], self.samples)]

    def _label(self, episodes: Sequence[Episode]) -> Label:
        # What the length limit or a fault cut is no answer yet, even if it reads like one.
        answers = [self.task.final_answer(e.text) if e.terminated and not e.fault else None for e in episodes]
        answer, votes = vote(answers)
        correct = None
        if answer is not None and self.knows_truth:
            worth = self.answerer.true_returns([episodes[answers.index(answer)]])[0]
            correct = None if math.isnan(worth) else worth >= CORRECT
        return Label(episodes[0].example.id, answer, votes, self.samples, correct)


def terciles(labels: Sequence[Label]) -> list[list[Label]]:
    """The labels in up to three groups of rising agreement, cut at its terciles; equal agreement is never parted."""
    cuts = np.quantile([label.agreement for label in labels], (1 / 3, 2 / 3), method="inverted_cdf")
    groups: list[list[Label]] = [[], [], []]
    for label in labels:
        groups[int(np.searchsorted(cuts, label.agreement))].append(label)
    return [group for group in groups if group]


def label_file(config: Config, samples: int, prompts: int | None, output: str | Path, console: Console) -> Path:
    """Label the training prompts, write one JSONL row each, and print how far the labels can be trusted.

    Args:
        config: names task, model, sampling and seed.
        samples: answers a prompt.
        prompts: only so many of the first ones; None: all.
        output: the file; written at the end, whole.
        console: shows progress and result.

    Raises:
        InputError: a task that cannot be labelled, a number out of range, a folder that is not there.
    """
    for option, number in (("--samples", samples), ("--prompts", prompts)):
        if number is not None and number < 1:
            raise InputError(f"{option} = {number} is too few: take at least 1")
    file = output_file(output, "--output")
    labeller = Labeller(config, samples)
    count = len(labeller.examples) if prompts is None else min(prompts, len(labeller.examples))
    step = max(1, config.sampling.batch_size // samples)
    starts = track(range(0, count, step), "labelling", console=console, disable=not console.is_terminal)
    labels = [label for start in starts for label in labeller.label(start, min(start + step, count))]
    write_atomically(file, [(json.dumps(label.row(labeller.knows_truth)) + "\n").encode() for label in labels])
    print_summary(labels, console)
    console.print(f"labels: {file}", soft_wrap=True)
    return file


def print_summary(labels: Sequence[Label], console: Console) -> None:
    """Mean agreement, share without an answer, and, where the truth is known, accuracy in all and by agreement."""
    agreement = float(np.mean([label.agreement for label in labels]))
    unanswered = float(np.mean([label.answer is None for label in labels]))
    console.print(
        f"{len(labels)} prompts, {labels[0].samples} samples each: "
        f"agreement {100 * agreement:.1f}% in the mean, {100 * unanswered:.1f}% without an answer"
    )
    judged = [label for label in labels if label.correct is not None]
    if not judged:
        return
    table = Table(title="accuracy of the labels (%), 95% Wilson intervals in brackets")
    for column in ("labels", "agreement", "number", "accuracy"):
        table.add_column(column, justify="right")
    groups = terciles(judged)
    names = {1: [], 2: ["least agreed", "most agreed"], 3: ["least agreed", "middle", "most agreed"]}[len(groups)]
    for name, group in [("all", judged), *zip(names, groups, strict=False)]:
        shares = [100 * label.agreement for label in group]
        table.add_row(name, f"{min(shares):.0f} to {max(shares):.0f}", str(len(group)), _accuracy(group))
    console.print(table)


def _accuracy(labels: Sequence[Label]) -> str:
    right = sum(bool(label.correct) for label in labels)
    return interval(right / len(labels), *wilson_interval(right, len(labels)))
