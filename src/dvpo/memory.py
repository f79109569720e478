"""How much memory a training step will hold, from a config and a model's shape, before any weight is loaded.

    peak   = base + weights + moments + max(sampling, update)
    update = max over policy and critic of (copies + gradients + activations + heads) + rollout

An estimate: activations are those of a decoder layer with gated feed-forward and grouped queries, and every sequence is
taken to be as long as the config allows. `benchmarks/memory.py` holds it against measurements on a CPU.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from dvpo.algorithms import find_algorithm
from dvpo.config import Config
from dvpo.frozen import hold_frozen
from dvpo.lora import add_adapters, shares_base
from dvpo.parallel import layers_of
from dvpo.policy import logit_budget
from dvpo.settings import LoraConfig

FLOAT = 4
LOGIT_COPIES = 5
"""Of a chunk of logits while its log-probs are differentiated: raw, by temperature, probabilities, two products."""
DRAW_COPIES = 9
"""Of the logits of a token that is drawn, in float32s: raw, by temperature, log-probs, three in float64."""
LOSS_COPIES = 14
"""Of a token's N x M predictions while the critic's terms are made and differentiated."""
LAWS = 2
"""One law for each token of a step, beside the heads' predictions: their mean in order, and the target."""
HOLES = 2.0
"""On a CPU, what a trunk with adapters keeps takes so many times its size: peft's products come and go between what
stays, and malloc keeps their places (measured at three sizes)."""


class Parameters(NamedTuple):
    """Weights of a causal language model, of its trunk, and of one of its layers: how many, or how many bytes."""

    model: int
    trunk: int
    layer: int


@dataclass(frozen=True)
class Prediction:
    """Bytes of a step, part by part."""

    base: int
    """Of the process before there is a model."""
    weights: int
    moments: int
    sampling: int
    """Keys and values, copies of the weights, and what one pass makes."""
    copies: int
    """Of weights while an update uses them: as autocast casts them, or as `fsdp` gathers them and adds gradients."""
    gradients: int
    """Of the module that is updated where the peak is."""
    activations: int
    heads: int
    """Logits or the critic's terms."""
    rollout: int
    """Values and targets of a whole step."""
    host: int
    """In host memory instead, with `distributed.cpu_offload`: the share of weights, moments and gradients."""

    @property
    def update(self) -> int:
        return self.copies + self.gradients + self.activations + self.heads + self.rollout

    @property
    def peak(self) -> int:
        return self.base + self.weights + self.moments + max(self.sampling, self.update)


def count_weights(model_config: Any, dtype: torch.dtype = torch.float32) -> tuple[Parameters, Parameters]:
    """How many weights a model of that config has, without making them, and their bytes where they never learn."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    layer = max(layers_of(model), key=lambda part: sum(p.numel() for p in part.parameters()), default=model.base_model)
    parts = [[*part.parameters()] for part in (model, model.base_model, layer)]
    numbers = Parameters(*(sum(p.numel() for p in part) for part in parts))
    hold_frozen(model, dtype)
    return numbers, Parameters(*(sum(p.nbytes for p in part) for part in parts))


def adapter_parameters(model_config: Any, settings: LoraConfig) -> int:
    """Count the weights of the adapters that a model of that config would have."""
    if not settings.rank:
        return 0
    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(model_config).base_model
        add_adapters(trunk, settings, "model.lora")
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


def predict(config: Config, model_config: Any, base: int = 0, on_gpu: bool = False, processes: int = 1) -> Prediction:
    """What the peak of a run will be on the device of one process.

    Args:
        config: of the run.
        model_config: of the policy, as transformers has it.
        base: bytes that the process holds without a model.
        on_gpu: whether that device is a GPU.
        processes: how many share the run, by `distributed.strategy`.
    """
    case = _Case(config, model_config, on_gpu, processes)
    update = max(case.policy_update(), case.critic_update(), key=sum)
    weights, moments, gradients = case.weights, case.moments, update.gradients
    host = 0
    if on_gpu and case.sharded and config.distributed.cpu_offload:
        host, weights, moments, gradients = weights + moments + gradients, 0, 0, 0
    return Prediction(
        base=base,
        weights=weights,
        moments=moments,
        sampling=case.sampling(),
        copies=update.copies,
        gradients=gradients,
        activations=update.activations,
        heads=update.heads,
        rollout=case.rollout,
        host=host,
    )


class _Update(NamedTuple):
    """Bytes while a module is updated; the parts of `Prediction`."""

    copies: int
    gradients: int
    activations: int
    heads: int


class _Case:
    """What the parts are counted from."""

    def __init__(self, config: Config, model_config: Any, on_gpu: bool, processes: int) -> None:
        self.config, self.on_gpu = config, on_gpu
        self.shape, self.row = model_config.get_text_config(), find_algorithm(config.algorithm)
        self.size = getattr(torch, config.model.dtype).itemsize
        self.sharded = config.distributed.strategy == "fsdp"
        self.share = processes if self.sharded else 1
        self.numbers, self.frozen = count_weights(model_config, getattr(torch, config.model.dtype))
        self.own_trunk = self.row.has_critic and config.critic.trunk != "shared"
        self.adapter = adapter_parameters(model_config, config.model.lora)
        self.critic_adapter = adapter_parameters(model_config, config.critic_lora) if self.own_trunk else 0
        self.trunk_learns = self.own_trunk and config.critic.trunk == "own" and not self.critic_adapter

        sampling, update = config.sampling, config.update
        self.responses = ceil(sampling.prompts_per_step / processes) * sampling.samples_per_prompt
        self.judged = ceil(config.evaluation.prompts / processes)
        self.response = sampling.max_completion_length
        self.length = sampling.max_prompt_length + self.response
        self.rows = min(update.microbatch_size, ceil(self.responses / update.minibatches))
        if update.max_tokens_per_microbatch:
            self.rows = max(1, min(self.rows, update.max_tokens_per_microbatch // self.length))

    @cached_property
    def outputs(self) -> int:
        """Numbers that the critic predicts at a token."""
        critic, row = self.config.critic, self.row.critic
        quantiles = critic.num_quantiles if self.row.has_law else 1
        return {"none": 0, "vocabulary": self.shape.vocab_size}.get(row, critic.num_heads * quantiles)

    @cached_property
    def heads(self) -> int:
        """Parameters of the critic's heads; a monotone one has a base besides its quantiles."""
        critic = self.config.critic
        bases = critic.num_heads if critic.monotone and self.row.has_law and critic.num_quantiles > 1 else 0
        return (self.shape.hidden_size + 1) * (self.outputs + bases)

    @property
    def weights(self) -> int:
        policy = self.frozen.model if self.adapter else FLOAT * self.numbers.model
        trunk = FLOAT * self.numbers.trunk if self.trunk_learns else self.frozen.trunk
        own = trunk if self.own_trunk and not shares_base(self.config) else 0
        reference = self.frozen.model if self.config.actor.kl.coef and not self.adapter else 0
        learning = FLOAT * (self.adapter + self.heads + self.critic_adapter)
        return (policy + own + reference + learning) // self.share

    @property
    def policy_learns(self) -> int:
        return self.adapter or self.numbers.model

    @property
    def critic_learns(self) -> int:
        return self.heads + self.critic_adapter + (self.numbers.trunk if self.trunk_learns else 0)

    @property
    def moments(self) -> int:
        return 2 * FLOAT * (self.policy_learns + self.critic_learns) // self.share

    @property
    def rollout(self) -> int:
        """Values and targets of a step's tokens."""
        if not self.row.has_critic:
            return 0
        quantiles = self.config.critic.num_quantiles if self.row.has_law else 1
        copies = 2 if self.config.advantage.recentre else 1  # as predicted, and moved
        laws = copies * self.config.critic.num_heads + LAWS
        return FLOAT * self.responses * self.response * laws * quantiles

    def policy_update(self) -> _Update:
        logits = LOGIT_COPIES * FLOAT * min(self.rows * self.response * self.shape.vocab_size, self._budget)
        kept = self._activations(bool(self.adapter))
        copies = self._copies(self.numbers.model, self.frozen.model, not self.adapter, kept + logits)
        return _Update(copies, FLOAT * self.policy_learns // self.share, kept, logits)

    def critic_update(self) -> _Update:
        if not self.row.has_critic:
            return _Update(0, 0, 0, 0)
        outputs = self.rows * self.response * self.outputs
        of_logits = self.row.critic == "vocabulary"
        terms = LOGIT_COPIES * FLOAT * min(outputs, self._budget) if of_logits else LOSS_COPIES * FLOAT * outputs
        kept = self._activations(bool(self.critic_adapter)) if self.critic_learns > self.heads else 0
        copies = self._copies(self.numbers.trunk, self.frozen.trunk, self.trunk_learns, kept + terms)
        return _Update(copies, FLOAT * self.critic_learns // self.share, kept, terms)

    def sampling(self) -> int:
        """The largest batch of rows that go on to the end, each with a prompt of its own."""
        settings, shape = self.config.sampling, self.shape
        if settings.engine == "vllm":
            return 0
        rows = min(settings.batch_size, max(self.responses, self.judged))
        _, queries, keys = self._widths
        # Of one layer once more: while its buffers grow, and as every query's own, where rows have padding.
        cache = 2 * self.size * rows * self.length * (keys * (shape.num_hidden_layers + 1) + queries)
        inner = self._widths[0]
        reading = rows * settings.max_prompt_length * (4 * FLOAT * shape.hidden_size + 3 * self.size * inner)
        drawing = DRAW_COPIES * FLOAT * rows * shape.vocab_size
        if self.sharded:
            copies = self.size * self.numbers.model
        else:
            copies = 0 if self.adapter else FLOAT * self.numbers.model - self.frozen.model
            if self.size < FLOAT and getattr(shape, "tie_word_embeddings", False):
                copies += self.size * shape.vocab_size * shape.hidden_size
        return copies + cache + max(reading, drawing)

    @property
    def _budget(self) -> int:
        return logit_budget(self.on_gpu)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of the feed-forward, of all queries, of all keys."""
        shape = self.shape
        inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        keys = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        return inner, shape.num_attention_heads * head, keys * head

    def _activations(self, fixed: bool) -> int:
        """What a trunk keeps for its backward pass, and what that makes on the way; fixed: beside adapters."""
        hidden, layers = self.shape.hidden_size, self.shape.num_hidden_layers
        inner, queries, keys = self._widths
        # Two norms (input, normalised, scaled); query, key and value with their norms and rotations, repeated for the
        # queries of a group; attention's result, twice; gate, its activation, up, their product.
        kept = 6 * hidden + 7 * queries + 4 * keys + 4 * inner
        if fixed:  # norms whose weights do not learn keep less
            kept = 4 * hidden + 3 * queries + 3 * keys + 4 * inner
        numbers = layers * hidden + kept if self.config.model.gradient_checkpointing else layers * kept
        holes = HOLES if fixed and not self.on_gpu else 1.0
        return round(holes * self.rows * self.length * (numbers * self.size + FLOAT * (4 * hidden + 3 * inner)))

    def _copies(self, numbers: int, frozen: int, learns: bool, beside: int) -> int:
        """Copies of a module's weights while it is updated, and where it is sharded gradients before they are added.

        Args:
            numbers, frozen: its weights, and their bytes if they never learn.
            learns: whether all of it does.
            beside: what a pass holds that is gone when the gradients of what is outside the layers are added, last.
        """
        if not self.sharded:
            return FLOAT * numbers - frozen if learns else 0
        layer = self.numbers.layer
        outside = numbers - layer * self.shape.num_hidden_layers
        added = (self.size + FLOAT) * (outside + layer) if learns else 0
        return self.size * (outside + 2 * layer) + max(0, added - beside)
