"""The supervised warm start of the embedded model: it learns to write solutions, and to judge them.

*Solving* is next-token prediction on the demonstrations of `dvpo.tasks.math`, which are partly wrong.

*Checking* asks at the prompt's last token and at every token of each solution: will the final answer be right?
The verdict is the difference of two logits, `<|good|>` minus `<|bad|>`, read from the very hidden state that
predicts the next token; it is trained by binary cross-entropy. A critic that starts from this backbone therefore
starts with an opinion, as a critic on a real pretrained model does; without one it stays blind for long.

The dial `checker` says how much the checker knows: the share of facts (chosen by hash) whose errors it can see. An
error in any other fact goes unseen, and a solution counts as good if the errors that are seen cancel or are none.
At 1 the labels are the truth; at 0 every label is "good", which teaches nothing at the same cost. A checker that
knows more than the solver is an **assumption**, so every result names its dial.

    python -m dvpo.warmstart [--checker 1.0] [--seed 0] [--rebuild] [--out DIR]

Finished models for the dials 1 and 0 with seed 0 are part of the package (`dvpo/assets`); they are made again by
`python -m dvpo.warmstart --rebuild --out src/dvpo/assets [--checker 0]`.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from dvpo.durable import disk_full_named, flush_file
from dvpo.embedded import BAD, GOOD, make_model, make_tokenizer
from dvpo.errors import InputError
from dvpo.tasks.math import (
    TASK_VERSION,
    ChainArithmetic,
    Demonstration,
    Question,
    demonstrate,
    hash_share,
    parse_answer,
)

RECIPE_VERSION = 1
"""Raised whenever this file or `embedded.py` changes what a recipe yields."""

EASY_MIX = (0.4, 0.4, 0.2)
FULL_MIX = (0.1, 0.3, 0.3, 0.1, 0.1, 0.1)
"""Shares of chains with 1, 2, 3, ... operations: facts are learnt fastest on short chains, so they come first.
Chains as long as the task's `ood` are among them (never its questions): reinforcement learning, not the warm start,
sees short chains only."""

SORTING_POOL = 8
"""Batches that are sorted by length together, so that little is padded."""


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
    """

    checker: float = 1.0
    seed: int = 0
    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 3e-3
    verdict_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.checker <= 1.0:
            raise InputError(f"checker is {self.checker}, but is a share: choose a number from 0 to 1")

    @property
    def folder(self) -> str:
        """The name of the finished model's folder, which ends in a hash of the recipe and of the code's versions."""
        content = {**asdict(self), "checker": float(self.checker), "versions": [RECIPE_VERSION, TASK_VERSION]}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return f"math-checker{self.checker:g}-seed{self.seed}-{key}"


def warm_start(
    checker: float = 1.0,
    seed: int = 0,
    *,
    rebuild: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder of the warm-started embedded model: shipped, cached, or made now (3 to 5 minutes).

    Args:
        checker: the dial: the share of facts whose errors the checker sees, in [0, 1].
        seed: of the initial weights and of the demonstrations.
        rebuild: make the model in the cache even if it is at hand.
        cache: folder that holds the made models; by default `$DVPO_CACHE`, else `~/.cache/dvpo`.
        progress: show a progress bar, or a few lines where there is no terminal.

    Returns:
        A plain Hugging Face folder (weights, config, tokenizer, chat template) with `warmstart.json` beside them.

    Raises:
        InputError: if `checker` is outside [0, 1].
    """
    return obtain(Recipe(checker, seed), rebuild=rebuild, cache=cache, progress=progress)


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


def build(recipe: Recipe, folder: Path, progress: bool = True, replace: bool = False) -> Path:
    """Make the model and measure it; `folder` comes into being whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is noticed before the work
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        tokenizer, model = make_tokenizer(), make_model(seed=recipe.seed)
        with progress_reports(recipe.steps, progress) as report:
            train(model, tokenizer, recipe, report)
        metrics = measure(model, tokenizer, ChainArithmetic())
        story = json.dumps({"recipe": asdict(recipe), "metrics": metrics}, indent=2) + "\n"
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
    """One batch: conversations, where the response is predicted, and the checker's label for each sequence."""

    ids_BS: Tensor
    predicted_BS: Tensor
    """True at the positions whose *next* token belongs to the response; one shorter than `ids_BS`."""
    good_B: Tensor


def lessons(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[Lesson]:
    """Yield one batch a step, from short chains to all."""
    rng = random.Random(f"lessons {recipe.seed}")
    for first in range(0, recipe.steps, SORTING_POOL):
        mix = EASY_MIX if first < recipe.steps / 5 else FULL_MIX
        pool = [draw_demonstration(mix, rng) for _ in range(SORTING_POOL * recipe.batch_size)]
        pool.sort(key=lambda demonstration: len(demonstration.solution))
        batches = [pool[i : i + recipe.batch_size] for i in range(0, len(pool), recipe.batch_size)]
        rng.shuffle(batches)
        for batch in batches[: recipe.steps - first]:
            yield make_lesson(batch, recipe.checker, tokenizer)


def draw_demonstration(mix: tuple[float, ...], rng: random.Random) -> Demonstration:
    """Draw a question that is not held out, and the demonstrator's solution of it."""
    while True:
        (operations,) = rng.choices(range(1, len(mix) + 1), mix)
        question = Question.draw(operations, rng)
        if not question.held_out:
            return demonstrate(question, rng)


def make_lesson(batch: list[Demonstration], checker: float, tokenizer: PreTrainedTokenizerFast) -> Lesson:
    """Tokenise demonstrations as chats and label them as the checker sees them."""
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": demonstration.question.text},
                {"role": "assistant", "content": demonstration.solution},
            ],
            tokenize=False,
        )
        for demonstration in batch
    ]
    ids_BS = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    answering_BS = (ids_BS == assistant).cumsum(1) > 0
    return Lesson(
        ids_BS,
        answering_BS[:, :-1] & (ids_BS[:, 1:] != tokenizer.pad_token_id),
        torch.tensor([float(looks_good(demonstration, checker)) for demonstration in batch]),
    )


def looks_good(demonstration: Demonstration, checker: float) -> bool:
    """Whether the errors cancel, or are none, among those facts that the checker knows."""
    return sum(error for fact, error in demonstration.slips if hash_share(f"checked {fact}") < checker) == 0


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


def verdict(logits: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The log-odds of a right final answer, `<|good|>` minus `<|bad|>`: [..., V] -> [...]."""
    good, bad = tokenizer.convert_tokens_to_ids([GOOD, BAD])
    return logits[..., good] - logits[..., bad]


@contextmanager
def progress_reports(steps: int, wanted: bool) -> Iterator[Callable[[int, str], None]]:
    """Hand out `report(step, text)`: a bar on a terminal, a line for each tenth elsewhere, or nothing."""
    console = Console(stderr=True)
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


# --- what was learnt -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: ChainArithmetic, samples: int = 8
) -> dict[str, dict[str, float]]:
    """Measure accuracy (greedy, sampled at temperature 1, best of `samples`) and the verdicts on the samples.

    Returns:
        For `id` and `ood`: `greedy`, `sampled`, `pass_at_k`, `valid` (share of samples in the written form), and
        for the verdicts at the prompt (`first`), half-way and before the end token (`last`): `auroc_*`, `corr_*`.
    """
    results = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for split in ("id", "ood"):
            greedy = answer(model, tokenizer, task, split, samples=1)
            sampled = answer(model, tokenizer, task, split, samples=samples)
            results[split] = {
                "greedy": greedy.correct_BK.mean().item(),
                "sampled": sampled.correct_BK.mean().item(),
                "pass_at_k": sampled.correct_BK.amax(1).mean().item(),
                "valid": sampled.valid,
                **judge_verdicts(sampled),
            }
    return {split: {name: round(value, 4) for name, value in row.items()} for split, row in results.items()}


class Answers(NamedTuple):
    """K answers to each of B questions: right or wrong (1.0, 0.0), the verdict at each place, share well formed."""

    correct_BK: Tensor
    verdicts: dict[str, Tensor]
    valid: float


def answer(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: ChainArithmetic, split: str, samples: int
) -> Answers:
    """Let the model answer a split: greedily if `samples` is 1, else by that many samples at temperature 1."""
    examples = task.split(split)
    prompts = tokenizer.apply_chat_template(
        [example.prompt for example in examples],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    how = {"do_sample": False} if samples == 1 else {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
    ids_BS = model.generate(**prompts, max_new_tokens=task.max_completion_length, **how)
    prompt_length = prompts.input_ids.shape[1]
    completions = tokenizer.batch_decode(ids_BS[:, prompt_length:], skip_special_tokens=True)
    answers = [example.columns["answer"] for example in examples for _ in range(samples)]
    correct_B = torch.tensor(task.true_reward(completions, completions, ids_BS.tolist(), answer=answers))

    real_BS = ids_BS != tokenizer.pad_token_id
    positions_BS = (real_BS.cumsum(1) - 1).clamp(min=0)
    logits_BSV = model(ids_BS, attention_mask=real_BS.long(), position_ids=positions_BS).logits
    verdict_BS = verdict(logits_BSV, tokenizer)
    last_B = real_BS.shape[1] - 1 - real_BS.flip(1).int().argmax(1) - 1  # the position before the end token
    first_B = torch.full_like(last_B, prompt_length - 1)
    places = {"first": first_B, "middle": (first_B + last_B) // 2, "last": last_B}
    return Answers(
        correct_B.view(-1, samples),
        {name: verdict_BS.gather(1, place_B[:, None])[:, 0] for name, place_B in places.items()},
        sum(parse_answer(completion) is not None for completion in completions) / len(completions),
    )


def judge_verdicts(answers: Answers) -> dict[str, float]:
    """The area under the ROC curve of each place's verdict, and the correlation of its probability, with the truth."""
    figures = {}
    correct_B = answers.correct_BK.flatten()
    for place, verdict_B in answers.verdicts.items():
        right, wrong = verdict_B[correct_B == 1], verdict_B[correct_B == 0]
        beats = (right[:, None] > wrong).float() + (right[:, None] == wrong).float() / 2
        figures[f"auroc_{place}"] = beats.mean().item()
        both = torch.stack([verdict_B.sigmoid(), correct_B])
        figures[f"corr_{place}"] = torch.corrcoef(both)[0, 1].nan_to_num(0.0).item()
    return figures


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m dvpo.warmstart`."""
    parser = argparse.ArgumentParser(prog="python -m dvpo.warmstart", description="Warm-start the embedded model.")
    parser.add_argument("--checker", type=float, default=1.0, help="how much the checker knows, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rebuild", action="store_true", help="make the model even if it is at hand")
    parser.add_argument("--out", type=Path, help="folder to hold the made model (default: the cache)")
    options = parser.parse_args(arguments)
    try:
        folder = warm_start(options.checker, options.seed, rebuild=options.rebuild, cache=options.out)
    except InputError as error:
        parser.error(str(error))
    Console().print(f"{folder}\n{(folder / 'warmstart.json').read_text()}", highlight=False)


if __name__ == "__main__":
    main()
