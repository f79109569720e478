"""`dvpo doctor CONFIG.yaml --gpus N`: what each of N GPUs will hold, predicted where there are none."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.lora import refuse_without_peft
from dvpo.memory import Prediction, predict
from dvpo.parallel import refuse_sharing
from dvpo.policy import first_line, shape_of
from dvpo.warmstart import starting_model


def report_plan(config: Config, gpus: int, console: Console) -> None:
    """Print what each of so many GPUs will hold, from the config and the shape of its model; nothing is loaded.

    Raises:
        InputError: no GPU, a run that so many cannot share, a missing package, or a model whose shape is not to be
            had or of no known kind.
    """
    if gpus < 1:
        raise InputError(f"--gpus = {gpus} is no number of GPUs: give 1 or more")
    refuse_sharing(config, gpus)
    refuse_without_peft(config.model.lora)
    path, sharded = config.model.path, config.distributed.strategy == "fsdp"
    need = _predicted(config, shape_of(starting_model(config)), processes=gpus)
    each = f"each of {gpus} GPUs by {config.distributed.strategy}" if gpus > 1 else "one GPU"
    console.print(f"{config.algorithm}, {path}: predicted for {each}, not measured", soft_wrap=True)
    table = Table("what", "GB", box=SIMPLE)
    table.columns[1].justify = "right"
    for what, size in (
        ("weights", need.weights),
        ("moments of AdamW", need.moments),
        ("sampling: keys and values, weights in the compute type", need.sampling),
        ("an update", need.update),
        ("  weights, cast or gathered", need.copies),
        ("  gradients", need.gradients),
        ("  activations", need.activations),
        ("  logits or the critic's terms", need.heads),
        ("  values and targets of a step", need.rollout),
        ("peak: weights, moments, the larger of sampling and update", need.peak),
        *([("host memory of each process", need.host)] if need.host else []),
        *([("host memory of all, while models are opened", need.opening)] if sharded else []),
    ):
        table.add_row(what, f"{size / 1e9:.3g}" if size < 1e9 else f"{size / 1e9:.1f}")
    console.print(table)
    console.print(
        f"Most of it is {_lever(config, need)}. Every sequence has full length. On top come CUDA itself (about 0.5 "
        "GB), gaps between blocks, and a reward model if you load one there.",
        soft_wrap=True,
    )


def _predicted(config: Config, shape: Any, **given: Any) -> Prediction:
    try:
        return predict(config, shape, on_gpu=True, **given)
    except InputError:  # says what it is about
        raise
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"model.path = {config.model.path} is no causal language model, or of a family whose memory is not "
            f"predicted ({first_line(error)}): measure it by `dvpo doctor` without --gpus"
        ) from None


def _lever(config: Config, need: Prediction) -> str:
    """What holds most, and the settings that lower it."""
    lasting = need.weights + need.moments
    largest = max(lasting, need.sampling, need.update)
    if largest == lasting:
        return "weights and moments: more GPUs by distributed.strategy=fsdp, model.lora.rank or critic.trunk lower them"
    if largest == need.sampling:
        return f"sampling, which sampling.batch_size ({config.sampling.batch_size}) bounds"
    if need.rollout > need.activations + need.heads:
        return "values and targets: critic.num_quantiles or more GPUs lower them"
    return f"an update, which update.microbatch_size ({config.update.microbatch_size}) bounds"
