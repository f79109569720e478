"""How much memory a training step will hold, from a config and a model's shape, before any weight is loaded.

    peak = base + weights + moments + max over policy and critic of (gradients + activations + heads) + rollout

An estimate: activations are those of a decoder layer with gated feed-forward and grouped queries, every sequence is
taken to be as long as the config allows, and what sampling holds is left out. `benchmarks/memory.py` holds it against
measurements on a CPU.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from dvpo.algorithms import find_algorithm
from dvpo.config import Config
from dvpo.frozen import hold_frozen
from dvpo.lora import add_adapters, shares_base
from dvpo.policy import logit_budget
from dvpo.settings import LoraConfig

FLOAT = 4
LOGIT_COPIES = 5
"""Of a chunk of logits while its log-probs are differentiated: raw, by temperature, probabilities, two products."""
LOSS_COPIES = 14
"""Of a token's N x M predictions while the critic's terms are made and differentiated."""
VALUE_COPIES = 3
"""Of all predictions of a step: the pieces, and the whole of which they are put together."""
HOLES = 2.0
"""On a CPU, what a trunk with adapters keeps takes so many times its size: peft's products come and go between what
stays, and malloc keeps their places (measured at three sizes)."""


class Parameters(NamedTuple):
    """Weights of a causal language model, and of its trunk: how many, or how many bytes."""

    model: int
    trunk: int


@dataclass(frozen=True)
class Prediction:
    """Bytes of a step, part by part."""

    base: int
    """Of the process before there is a model."""
    weights: int
    moments: int
    gradients: int
    """Of the module that is updated where the peak is."""
    activations: int
    heads: int
    """Logits or the critic's terms."""
    rollout: int
    """Values and targets of a whole step."""

    @property
    def peak(self) -> int:
        parts = (self.weights, self.moments, self.gradients, self.activations, self.heads, self.rollout)
        return self.base + sum(parts)


def parameters_of(model_config: Any) -> Parameters:
    """Count the weights of a model of that config without making them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    return Parameters(*(sum(p.numel() for p in part.parameters()) for part in (model, model.base_model)))


def frozen_bytes(model_config: Any, dtype: torch.dtype) -> Parameters:
    """What they take where they never learn."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    hold_frozen(model, dtype)
    return Parameters(*(sum(p.nbytes for p in part.parameters()) for part in (model, model.base_model)))


def adapter_parameters(model_config: Any, settings: LoraConfig) -> int:
    """Count the weights of the adapters that a model of that config would have."""
    if not settings.rank:
        return 0
    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(model_config).base_model
        add_adapters(trunk, settings, "model.lora")
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


def predict(config: Config, model_config: Any, base: int = 0, on_gpu: bool = False) -> Prediction:
    """What the peak of a training step will be on one device, in one process.

    Args:
        config: of the run.
        model_config: of the policy, as transformers has it.
        base: bytes that the process holds without a model.
        on_gpu: whether that device is a GPU.
    """
    row, shape = find_algorithm(config.algorithm), model_config.get_text_config()
    model, trunk = parameters_of(model_config)
    own_trunk = row.has_critic and config.critic.trunk != "shared"
    quantiles = config.critic.num_quantiles if row.has_law else 1
    outputs = {"none": 0, "vocabulary": shape.vocab_size}.get(row.critic, config.critic.num_heads * quantiles)
    bases = config.critic.num_heads if config.critic.monotone and outputs and quantiles > 1 else 0
    head = (shape.hidden_size + 1) * (outputs + bases)
    adapter = adapter_parameters(model_config, config.model.lora)
    critic_adapter = adapter_parameters(model_config, config.critic_lora) if own_trunk else 0
    learning = head + (critic_adapter or (trunk if own_trunk and config.critic.trunk == "own" else 0))
    frozen = frozen_bytes(model_config, getattr(torch, config.model.dtype))
    of_trunk = frozen.trunk if config.critic.trunk == "frozen" or critic_adapter else FLOAT * trunk
    policy = (frozen.model if adapter else FLOAT * model) + FLOAT * adapter
    critic = FLOAT * (head + critic_adapter) + (of_trunk if own_trunk and not shares_base(config) else 0)
    reference = frozen.model if config.actor.kl.coef and not adapter else 0

    batch = ceil(config.sampling.responses_per_step / config.update.minibatches)
    rows = min(config.update.microbatch_size, batch)
    response = config.sampling.max_completion_length
    length = config.sampling.max_prompt_length + response
    if config.update.max_tokens_per_microbatch:
        rows = max(1, min(rows, config.update.max_tokens_per_microbatch // length))
    tokens = rows * length
    plain, beside = (_activations(config, shape, tokens, fixed, on_gpu) for fixed in (False, True))
    logits = LOGIT_COPIES * FLOAT * min(rows * response * shape.vocab_size, logit_budget(on_gpu))
    terms = LOSS_COPIES * FLOAT * rows * response * outputs if row.critic != "vocabulary" else logits
    of_policy = (FLOAT * (adapter or model), beside if adapter else plain, logits)
    kept = 0 if learning == head else beside if critic_adapter else plain
    of_critic = (FLOAT * learning, kept, terms if row.has_critic else 0)
    gradients, activations, heads = max(of_policy, of_critic, key=sum)
    values = config.sampling.responses_per_step * response * (config.critic.num_heads * VALUE_COPIES + 1) * quantiles
    return Prediction(
        base=base,
        weights=policy + critic + reference,
        moments=2 * FLOAT * ((adapter or model) + learning),
        gradients=gradients,
        activations=activations,
        heads=heads,
        rollout=FLOAT * values if row.has_critic else 0,
    )


def _activations(config: Config, shape: Any, tokens: int, fixed: bool, on_gpu: bool) -> int:
    """What a trunk keeps for its backward pass, and what that makes on the way, in bytes; fixed: beside adapters."""
    hidden, inner = shape.hidden_size, getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    head_size = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    queries = shape.num_attention_heads * head_size
    keys = (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) * head_size
    # Two norms (input, normalised, scaled); query, key and value with their norms and rotations, repeated for the
    # queries of a group; attention's result, twice; gate, its activation, up, their product.
    kept = 6 * hidden + 7 * queries + 4 * keys + 4 * inner
    if fixed:  # norms whose weights do not learn keep less
        kept = 4 * hidden + 3 * queries + 3 * keys + 4 * inner
    layers = shape.num_hidden_layers
    passing = 4 * hidden + 3 * inner
    size = 2 if config.model.dtype == "bfloat16" else FLOAT
    floats = layers * hidden + kept if config.model.gradient_checkpointing else layers * kept
    holes = HOLES if fixed and not on_gpu else 1.0
    return round(holes * tokens * (floats * size + passing * FLOAT))
