"""`dvpo reward-model`: a reward model is learnt from preference pairs.

Bradley & Terry 1952; Ouyang et al. 2022, "Training language models to follow instructions with human feedback":

    P(chosen preferred to rejected) = sigmoid(r(prompt, chosen) - r(prompt, rejected))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from dvpo.errors import InputError
from dvpo.optimiser import Optimiser
from dvpo.policy import choose_device
from dvpo.preferences import Pair, read_pairs
from dvpo.reward_model import RewardModel, make_reward_model
from dvpo.seeding import derive_seed
from dvpo.settings_learning import OptimiserConfig
from dvpo.stats import Interval, wilson_interval
from dvpo.warmstart import warm_start


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """The loss of each pair.

        loss = -log sigmoid(g),   d loss / d chosen = -sigmoid(-g),   g = chosen - rejected

    Args:
        chosen_B: scores of the preferred completions.
        rejected_B: scores of the others.

    Returns:
        [B], in nats.

    Raises:
        ValueError: if the shapes differ or are not [B].
    """
    if chosen_B.dim() != 1 or chosen_B.shape != rejected_B.shape:
        raise ValueError(f"scores must be two of [B], got {tuple(chosen_B.shape)} and {tuple(rejected_B.shape)}")
    return -F.logsigmoid(chosen_B - rejected_B)


@dataclass(frozen=True)
class Training:
    """How a reward model is trained."""

    epochs: int = 2
    batch_size: int = 32
    """Pairs in an optimiser step."""
    lr: float = 1e-3
    """Falls to 0 at the end. The default suits the embedded model; take about 1e-5 for a large one."""
    held_out: float = 0.1
    """Share of the prompts kept for the test, by hash."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, ok in (
            ("epochs", self.epochs >= 1),
            ("batch-size", self.batch_size >= 1),
            ("lr", 0 < self.lr < math.inf),
            ("held-out", 0 < self.held_out < 1),
        ):
            if not ok:
                value = getattr(self, option.replace("-", "_"))
                bounds = "a share between 0 and 1" if option == "held-out" else "a positive number"
                raise InputError(f"--{option} = {value} is out of range: take {bounds}")


@dataclass(frozen=True)
class Result:
    """The figures of one epoch; epoch 0 is before training."""

    epoch: int
    loss: float | None
    """Mean Bradley-Terry loss of the epoch's training pairs, in nats."""
    pairs: int
    """Held-out pairs."""
    agreed: int
    """Held-out pairs in which the chosen completion scores higher; a tie is a miss."""
    known: int
    """Held-out pairs of which the file says whether they are swapped."""
    right: int
    """Those of them in which the truly better completion scores higher."""

    @property
    def accuracy(self) -> float:
        return self.agreed / self.pairs

    @property
    def interval(self) -> Interval:
        return wilson_interval(self.agreed, self.pairs)


def train_reward_model(
    model: RewardModel, pairs: Sequence[Pair], settings: Training, report: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Train in place; the result before training and after each epoch.

    Args:
        model: its weights move.
        pairs: are divided by the hash of their prompts into those to learn from and those to be tested on.
        settings: see `Training`.
        report: told about every result when it is there.

    Raises:
        InputError: too few prompts for the division.
    """
    held = [pair for pair in pairs if pair.held_out(settings.held_out)]
    learnt = [pair for pair in pairs if not pair.held_out(settings.held_out)]
    if not held or not learnt:
        raise InputError(
            f"--held-out = {settings.held_out:g} leaves {len(learnt)} pairs to learn from and {len(held)} to test on: "
            "give more prompts, or another share"
        )
    rows = _encoded(model, learnt)
    batches = math.ceil(len(rows) / settings.batch_size)
    optimiser = Optimiser(
        model.model, OptimiserConfig(lr=settings.lr, schedule="linear"), steps=settings.epochs * batches
    )
    results = [_test(model, held, 0, None)]
    report(results[0])
    for epoch in range(1, settings.epochs + 1):
        generator = torch.Generator().manual_seed(derive_seed("reward model", settings.seed, epoch))
        order = torch.randperm(len(rows), generator=generator).tolist()
        total = 0.0
        for batch in range(batches):
            chosen, rejected = zip(*(rows[i] for i in order[batch::batches]), strict=True)
            chosen_B, rejected_B = model.scores([*chosen, *rejected]).chunk(2)
            loss_B = bradley_terry_loss(chosen_B, rejected_B)
            loss_B.mean().backward()
            optimiser.update((epoch - 1) * batches + batch + 1)
            total += float(loss_B.detach().sum())
        results.append(_test(model, held, epoch, total / len(rows)))
        report(results[-1])
    return results


def _encoded(model: RewardModel, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    return [(model.encode(p.prompt, p.chosen), model.encode(p.prompt, p.rejected)) for p in pairs]


def _test(model: RewardModel, held: Sequence[Pair], epoch: int, loss: float | None) -> Result:
    chosen_B, rejected_B = model.judge(
        [row for pair in zip(*_encoded(model, held), strict=True) for row in pair]
    ).chunk(2)
    agreed = (chosen_B > rejected_B).tolist()
    turned = (chosen_B < rejected_B).tolist()
    right = [
        t if pair.swapped else a for pair, a, t in zip(held, agreed, turned, strict=True) if pair.swapped is not None
    ]
    return Result(epoch, loss, len(held), sum(agreed), len(right), sum(right))


def record_of(settings: Training, model: str, pairs: str, results: Sequence[Result]) -> dict[str, Any]:
    """What is written beside the weights: where they come from and how good they are."""
    epochs = [{**asdict(r), "accuracy": r.accuracy, "interval": list(r.interval)} for r in results]
    return {"model": model, "pairs": pairs, **asdict(settings), "results": epochs}


def train_folder(
    pairs: str | Path,
    model: str,
    output: str | Path,
    settings: Training,
    device: str,
    dtype: str,
    console: Console,
) -> list[Result]:
    """Train a reward model on a file of pairs, print how good it is after each epoch, and write its folder.

    Args:
        pairs: see `dvpo.preferences`.
        model: where it starts: `embedded`, a Hugging Face folder or a hub name; a language model or a reward model.
        output: a folder that is not there yet; `reward_model.json` in it says how it was made and all results.
        settings: see `Training`.
        device: `auto`, `cpu`, `cuda` ...
        dtype: compute type.
        console: shows the results.

    Raises:
        InputError: whatever is wrong with the pairs, the model, the settings or the output.
    """
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--output = {folder} is there already: name another folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"--output = {folder}: there is no folder {folder.parent}; make it, or name another one")
    data = read_pairs(pairs)
    source = str(warm_start()) if model == "embedded" else model
    reward_model = make_reward_model(source, torch.device(choose_device(device)), dtype, settings.seed)
    results = train_reward_model(
        reward_model, data, settings, lambda result: console.print(_line(result), soft_wrap=True)
    )
    reward_model.save(folder, record_of(settings, model, str(pairs), results))
    console.print(f"reward model: {folder} (take it by reward.function=path:{folder})", soft_wrap=True)
    return results


def _line(result: Result) -> str:
    low, high = (100 * end for end in result.interval)
    loss = "before training" if result.loss is None else f"loss {result.loss:.3f}"
    truth = f", against the truth {100 * result.right / result.known:.1f}% of {result.known}" if result.known else ""
    return (
        f"epoch {result.epoch}: {loss}, {100 * result.accuracy:.1f}% [{low:.1f}, {high:.1f}] of {result.pairs} "
        f"held-out pairs ordered as labelled{truth}"
    )
