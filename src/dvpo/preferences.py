"""Preference pairs: one prompt, two completions, and which of them is preferred. Read from a file, or made by a task.

A row of the file is `{"prompt": ..., "chosen": ..., "rejected": ...}`: the prompt a string or a message list, the
completions strings or message lists. `"swapped": true` says that the preference is known to be wrong.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dvpo.answers import Answerer
from dvpo.config import Config
from dvpo.durable import output_file, write_atomically
from dvpo.errors import InputError
from dvpo.jsonl import json_objects
from dvpo.prompts import PromptStream
from dvpo.sampling import Episode
from dvpo.seeding import derive_seed, derive_uniform
from dvpo.tasks import Completion, Prompt
from dvpo.tasks.named import make_task


@dataclass(frozen=True)
class Pair:
    """Somebody prefers `chosen` to `rejected` as the answer to `prompt`."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    swapped: bool | None = None
    """Whether the truth is the other way round; None: nobody knows."""

    def held_out(self, share: float) -> bool:
        """Whether the pair is kept for the test: its prompt's hash alone decides, so no prompt is on both sides."""
        return derive_uniform("preferences held out", json.dumps(self.prompt, sort_keys=True)) < share

    def row(self) -> dict[str, Any]:
        row = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return row if self.swapped is None else {**row, "swapped": self.swapped}


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a JSONL file of pairs.

    Raises:
        InputError: an unreadable or empty file, or a line that is no pair.
    """
    try:
        pairs = [_pair(row, where) for where, row in json_objects(Path(path))]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a JSONL file of preference pairs") from None
    if not pairs:
        raise InputError(f'{path} is empty: give it lines of {{"prompt": ..., "chosen": ..., "rejected": ...}}')
    return pairs


def _pair(row: Mapping[str, Any], where: str) -> Pair:
    for key in ("prompt", "chosen", "rejected"):
        if not _is_text_or_messages(row.get(key)):
            raise InputError(
                f"{where} has no sound {key!r}: give a string, or a list of messages with role and content"
            )
    if row["chosen"] == row["rejected"]:
        raise InputError(f"{where} prefers a completion to itself: remove the line")
    if not isinstance(row.get("swapped"), bool | None):
        raise InputError(f"{where} has swapped = {row['swapped']!r}: write true or false, or leave it out")
    return Pair(row["prompt"], row["chosen"], row["rejected"], row.get("swapped"))


def _is_text_or_messages(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    return isinstance(value, str)


def make_pairs(config: Config, count: int, wrong: float = 0.0, console: Console | None = None) -> list[Pair]:
    """Pairs of answers of the starting model that the task's verifier tells apart.

    Of each prompt the first answer and the first one worth more or less than it: at most one pair a prompt and visit,
    so that the difficulty is that of the model's own answers. Passes over the training prompts until there are enough.

    Args:
        config: names task, model, sampling (`samples_per_prompt` answers a prompt) and seed.
        count: number of pairs.
        wrong: share of the pairs whose preference is turned (keyed by seed, prompt and visit); they say `swapped`.
        console: shows progress.

    Raises:
        InputError: a task that does not know the truth, numbers out of range, or no pair in the whole first pass.
    """
    if count < 1:
        raise InputError(f"--pairs = {count} is too few: take at least 1")
    if not 0 <= wrong <= 1:
        raise InputError(f"--wrong = {wrong:g} is no share: take a number from 0 to 1")
    if config.sampling.samples_per_prompt < 2:
        raise InputError("sampling.samples_per_prompt = 1 makes no pair: take at least 2")
    task = make_task(config.task)
    if not getattr(task, "knows_truth", True):
        raise InputError(f"--from-task: the task {task.name} cannot tell right from wrong: set task.truth")
    answerer = Answerer(config, task, purpose="preferences")
    stream = PromptStream(answerer.examples, derive_seed(config.seed, "preferences"))
    samples = config.sampling.samples_per_prompt
    at_once = max(1, config.sampling.batch_size // samples)
    pairs: list[Pair] = []
    with Progress(console=console, disable=console is None or not console.is_terminal) as progress:
        bar = progress.add_task("preference pairs", total=count)
        while len(pairs) < count:
            visit, place = divmod(stream.drawn, len(answerer.examples))
            if visit and not pairs:
                raise InputError("--from-task: no prompt had answers of different worth: raise sampling.temperature")
            # A draw never reaches into the next pass: the episodes of one draw share their visit.
            drawn = stream.next(min(at_once, len(answerer.examples) - place))
            for episodes in answerer.answer([example for example, _ in drawn], samples, visit):
                pairs += _told_apart(episodes, answerer.true_returns(episodes), wrong, config.seed)
            progress.update(bar, completed=len(pairs))
    return pairs[:count]


def _told_apart(episodes: Sequence[Episode], worth: Sequence[float], wrong: float, seed: int) -> list[Pair]:
    """One pair, or none: the first episode against the first whose known worth is another one."""
    first, example = episodes[0], episodes[0].example
    for other, value in zip(episodes[1:], worth[1:], strict=True):
        if value > worth[0] or value < worth[0]:  # NaN is neither
            better, worse = (other, first) if value > worth[0] else (first, other)
            swapped = derive_uniform("preference", seed, example.id, first.visit) < wrong if wrong else None
            chosen, rejected = (worse, better) if swapped else (better, worse)
            if (texts := (_completion(chosen), _completion(rejected)))[0] != texts[1]:
                return [Pair(example.prompt, *texts, swapped)]
    return []


def _completion(episode: Episode) -> Completion:
    """As a reward function is given it: text, and all messages of a conversation."""
    return episode.text if len(episode.messages) == 1 else [dict(message) for message in episode.messages]


def pairs_file(config: Config, count: int, wrong: float, output: str | Path, console: Console) -> Path:
    """Make pairs (see `make_pairs`) and write the file that `read_pairs` reads, whole or not at all.

    Raises:
        InputError: a file that is there already, a folder that is not, or what stands at `make_pairs`.
    """
    file = Path(output)
    if file.exists():
        raise InputError(f"{file} is there already: name another file, or train on it without --from-task")
    file = output_file(file)
    pairs = make_pairs(config, count, wrong, console)
    write_atomically(file, [(json.dumps(pair.row()) + "\n").encode() for pair in pairs])
    turned = sum(bool(pair.swapped) for pair in pairs)
    console.print(f"preference pairs: {len(pairs)}, of which {turned} are turned: {file}", soft_wrap=True)
    return file
