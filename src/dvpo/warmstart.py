"""The supervised warm start of the embedded model: it learns to write solutions, and to judge them.

*Solving* is next-token prediction of what the assistant says in a task's demonstrations (`dvpo.lessons`), which are
partly wrong.

*Checking* asks at every token from the prompt's last one on where the assistant speaks: will it end well?
The verdict is the difference of two logits, `<|good|>` minus `<|bad|>`, read from the very hidden state that
predicts the next token; it is trained by binary cross-entropy. A critic that starts from this backbone therefore
starts with an opinion, as a critic on a real pretrained model does; without one it stays blind for long.

The dial `checker` says how much the checker knows, from 0, where it learns nothing, to 1, where it learns the truth
(`dvpo.lessons`). A checker that knows more than the solver is an **assumption**, so every result names its dial.

    python -m dvpo.warmstart [--task math] [--checker 1.0] [--seed 0] [--rebuild] [--out DIR]

Finished models are part of the package (`dvpo/assets`), for seed 0 and, depending on the task, one dial or two; they
are made again by `python -m dvpo.warmstart --rebuild --out src/dvpo/assets [--task science] [--checker 0]`.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dvpo.config import Config
from dvpo.distributed import main_first
from dvpo.durable import disk_full_named, flush_file
from dvpo.embedded import ROLES, make_model, make_tokenizer
from dvpo.errors import InputError
from dvpo.interrupt import handled
from dvpo.lessons import SOURCES, Demonstrated
from dvpo.plain_text import plain_console
from dvpo.policy import Policy
from dvpo.verdicts import measure, verdict

RECIPE_VERSION = 1
"""Raised whenever this file or `embedded.py` changes what a recipe yields."""

SORTING_POOL = 8
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the finished model depends on; its hash names the folder.

    Args:
        checker: share of facts whose errors the checker sees, in [0, 1].
        seed: of the initial weights and of the demonstrations.
        steps: optimiser steps.
        batch_size: demonstrations a step.
        learning_rate: peak of the schedule (short warm-up, then constant, then linear decay).
        verdict_weight: weight of the checking loss beside the solving loss.
        task: whose demonstrations are learnt from.
    """

    checker: float = 1.0
    seed: int = 0
    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 3e-3
    verdict_weight: float = 1.0
    task: str = "math"

    @classmethod
    def of(cls, task: str, checker: float, seed: int) -> "Recipe":
        """The recipe of a task's embedded model.

        Raises:
            InputError: if the task has none, or `checker` is outside [0, 1].
        """
        if task not in SOURCES:
            raise InputError(
                f"model.path = embedded, but there is no embedded model for task.name = {task}: "
                "set model.path to a model folder or a hub name"
            )
        source = SOURCES[task]
        return cls(checker, seed, source.steps, source.batch_size, task=task)

    def __post_init__(self) -> None:
        if not 0.0 <= self.checker <= 1.0:
            raise InputError(f"checker is {self.checker}, but is a share: choose a number from 0 to 1")

    @property
    def folder(self) -> str:
        """The name of the finished model's folder, which ends in a hash of the recipe and of the code's versions."""
        versions = [RECIPE_VERSION, SOURCES[self.task].version]
        content = {**asdict(self), "checker": float(self.checker), "versions": versions}
        if self.task == "math":
            del content["task"]  # those keys are older than the field
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}-checker{self.checker:g}-seed{self.seed}-{key}"


def warm_start(
    task: str = "math",
    checker: float = 1.0,
    seed: int = 0,
    *,
    rebuild: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder of the warm-started embedded model: shipped, cached, or made now (some minutes).

    Args:
        task: the embedded task that it is made for: `math`, `science` or `dialogue`.
        checker: the dial: the share of facts whose errors the checker sees, in [0, 1].
        seed: of the initial weights and of the demonstrations.
        rebuild: make the model in the cache even if it is at hand.
        cache: folder that holds the made models; by default `$DVPO_CACHE`, else `~/.cache/dvpo`.
        progress: show a progress bar, or a few lines where there is no terminal.

    Returns:
        A plain Hugging Face folder (weights, config, tokenizer, chat template) with `warmstart.json` beside them.

    Raises:
        InputError: if the task has no embedded model, or `checker` is outside [0, 1].
    """
    return obtain(Recipe.of(task, checker, seed), rebuild=rebuild, cache=cache, progress=progress)


def start_for(task: str) -> str:
    """The embedded task whose model a run on `task` starts from; one of the user's own takes that of `math`, warned."""
    if task != "files" and ":" not in task:
        return task
    warnings.warn(
        "model.path = embedded is a tiny model that knows chains of sums such as 12+7-3= and nothing else: enough to "
        "try your data and your reward; for a run in earnest set model.path to a model folder or a hub name",
        stacklevel=2,
    )
    return "math"


def starting_model(config: Config) -> str | Path:
    """Folder or hub name of the policy before training; makes or fetches the embedded model if that is asked for."""
    if config.model.path == "embedded":
        with main_first():
            return warm_start(start_for(config.task.name), config.model.checker)
    return config.model.path


def obtain(recipe: Recipe, *, rebuild: bool = False, cache: Path | None = None, progress: bool = True) -> Path:
    """As `warm_start`, for any recipe."""
    cache = cache or Path(os.environ.get("DVPO_CACHE") or Path.home() / ".cache" / "dvpo")
    if not rebuild:
        for home in (shipped_models(), cache):
            if (home / recipe.folder).is_dir():
                return home / recipe.folder
    return build(recipe, cache / recipe.folder, progress, replace=rebuild)


def shipped_models() -> Path:
    """The folder inside the package that holds the finished models."""
    return Path(str(files("dvpo") / "assets"))


def build(
    recipe: Recipe, folder: Path, progress: bool = True, replace: bool = False, config: Qwen3Config | None = None
) -> Path:
    """Make the model, of the embedded size by default, and measure it; `folder` comes to be whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is noticed before the work
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        tokenizer, model = make_tokenizer(), make_model(config, recipe.seed)
        with progress_reports(recipe.steps, progress) as report:
            train(model, tokenizer, recipe, report)
        metrics = measure(Policy(model, tokenizer), SOURCES[recipe.task].make_task())
        known = {
            split: {name: None if math.isnan(value) else value for name, value in row.items()}
            for split, row in metrics.items()
        }
        story = json.dumps({"recipe": asdict(recipe), "metrics": known}, indent=2) + "\n"
        with disk_full_named(folder):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            (aside / "warmstart.json").write_text(story)
            for file in aside.iterdir():
                file.chmod(0o644)  # some were made for their owner only
                flush_file(file)
        aside.chmod(0o755)
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.is_dir():  # else a process beside this one was faster
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


# --- data ------------------------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """One batch: conversations, where the assistant's words are predicted, and the checker's label for each."""

    ids_BS: Tensor
    predicted_BS: Tensor
    """True at the positions whose *next* token is the assistant's; one shorter than `ids_BS`."""
    good_B: Tensor


def lessons(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[Lesson]:
    """Yield one batch a step, at first easy ones."""
    rng = random.Random(f"lessons {recipe.seed}")
    source = SOURCES[recipe.task]
    for first in range(0, recipe.steps, SORTING_POOL):
        easy = first < recipe.steps / 5
        pool = [source.draw(rng, easy, recipe.checker) for _ in range(SORTING_POOL * recipe.batch_size)]
        pool.sort(key=source.length)
        batches = [pool[i : i + recipe.batch_size] for i in range(0, len(pool), recipe.batch_size)]
        rng.shuffle(batches)
        for batch in batches[: recipe.steps - first]:
            yield make_lesson(batch, tokenizer)


def make_lesson(batch: Sequence[Demonstrated], tokenizer: PreTrainedTokenizerFast) -> Lesson:
    """Tokenise conversations as chats, and find in them what the assistant says, its end tokens included."""
    texts = [tokenizer.apply_chat_template(list(messages), tokenize=False) for messages, _ in batch]
    ids_BS = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    headers = torch.tensor(tokenizer.convert_tokens_to_ids(list(ROLES)))
    positions_S = torch.arange(ids_BS.shape[1])
    header_BS = torch.where(torch.isin(ids_BS, headers), positions_S, 0).cummax(dim=1).values
    speaker_BS = ids_BS.gather(1, header_BS)
    speaks_BS = speaker_BS == tokenizer.convert_tokens_to_ids("<|assistant|>")
    silent_BS = (ids_BS == tokenizer.eos_token_id) | (ids_BS == tokenizer.pad_token_id)
    return Lesson(
        ids_BS, (speaks_BS & ~silent_BS)[:, :-1], torch.tensor([float(demonstrated.good) for demonstrated in batch])
    )


# --- training --------------------------------------------------------------------------------------------------------


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    report: Callable[[int, str], None],
) -> None:
    """Train in place: solving loss + verdict_weight * checking loss, AdamW, gradient norm clipped at 1."""
    optimiser = torch.optim.AdamW(model.parameters(), recipe.learning_rate, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50, max(0.02, (1 - step / recipe.steps) / 0.6))
    )
    model.train()
    for step, lesson in enumerate(lessons(recipe, tokenizer)):
        solving, checking = losses(model, tokenizer, lesson)
        optimiser.zero_grad()
        (solving + recipe.verdict_weight * checking).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        report(step + 1, f"solving {solving.item():.3f}, checking {checking.item():.3f}")
    model.eval()


def losses(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """The mean cross-entropies of the next token and of the verdict, over the K positions that predict a response."""
    # Padding is on the right, where causal attention cannot see it: no attention mask is needed.
    hidden_BSD = model.model(lesson.ids_BS[:, :-1]).last_hidden_state
    logits_KV = model.lm_head(hidden_BSD[lesson.predicted_BS])
    targets_K = lesson.ids_BS[:, 1:][lesson.predicted_BS]
    good_K = lesson.good_B[:, None].expand_as(lesson.predicted_BS)[lesson.predicted_BS]
    solving = functional.cross_entropy(logits_KV, targets_K)
    checking = functional.binary_cross_entropy_with_logits(verdict(logits_KV, tokenizer), good_K)
    return solving, checking


@contextmanager
def progress_reports(steps: int, wanted: bool) -> Iterator[Callable[[int, str], None]]:
    """Hand out `report(step, text)`: a bar on a terminal, a line for each tenth elsewhere, or nothing."""
    console = plain_console(stderr=True)
    if not wanted:
        yield lambda step, text: None
    elif console.is_terminal:
        columns = ("warm start", BarColumn(), "{task.completed}/{task.total}", TextColumn("{task.description}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=steps)
            yield lambda step, text: bar.update(task, completed=step, description=text)
    else:
        tenth = max(1, steps // 10)

        def report(step: int, text: str) -> None:
            if step % tenth == 0:
                console.print(f"warm start: step {step}/{steps}, {text}", highlight=False)

        yield report


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m dvpo.warmstart`."""
    parser = argparse.ArgumentParser(prog="python -m dvpo.warmstart", description="Warm-start the embedded model.")
    parser.add_argument("--task", default="math", choices=list(SOURCES), help="default: math")
    parser.add_argument("--checker", type=float, default=1.0, help="how much the checker knows, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rebuild", action="store_true", help="make the model even if it is at hand")
    parser.add_argument("--out", type=Path, help="folder to hold the made model (default: the cache)")
    options = parser.parse_args(arguments)
    try:
        with handled():  # what was half made is removed
            folder = warm_start(options.task, options.checker, options.seed, rebuild=options.rebuild, cache=options.out)
    except InputError as error:
        parser.error(str(error))
    plain_console().print(f"{folder}\n{(folder / 'warmstart.json').read_text()}", highlight=False)


if __name__ == "__main__":
    main()
