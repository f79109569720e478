"""How much memory a run will hold on a device, from a config and a model's shape, before any weight is loaded.

    peak   = base + weights + moments + max(sampling, update)
    update = max over policy and critic of (copies + gradients + activations + heads) + rollout

An estimate: activations are those of a decoder layer with gated feed-forward and grouped queries, every sequence is
taken to be as long as the config allows, and a critic to have the policy's shape. Reward models, gaps between blocks
and CUDA itself come on top. `benchmarks/memory.py` holds it against measurements on a CPU.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from dvpo.algorithms import find_algorithm
from dvpo.config import Config
from dvpo.decoding import RoomyLayer
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
ONE_TURN = {"math", "science", "files", "reasoning_gym"}
"""Tasks whose contexts are prompts; where there are further turns, each is read with all that went before it."""


class Part(NamedTuple):
    """Of a model: how many weights it has, and how many of them would be cast if they never learnt (`frozen.py`)."""

    number: int
    castable: int

    def frozen(self, size: int) -> int:
        """Bytes where they never learn; size: of a number of the compute type."""
        return FLOAT * self.number - (FLOAT - size) * self.castable

    def casts(self, size: int) -> int:
        """Bytes of the copies that autocast makes where they learn."""
        return size * self.castable if size < FLOAT else 0


class Parts(NamedTuple):
    model: Part
    trunk: Part
    layers: Part
    """All of them together."""
    layer: Part
    """The largest."""
    head: int
    """Weights of the language-model head."""
    tied: bool
    """Whether those are the embeddings', which are cast for the head's product and stay float32."""


@dataclass(frozen=True)
class Prediction:
    """Bytes, part by part."""

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
    opening: int
    """In host memory of all processes together, while models that are to be sharded are opened."""

    @property
    def update(self) -> int:
        return self.copies + self.gradients + self.activations + self.heads + self.rollout

    @property
    def peak(self) -> int:
        return self.base + self.weights + self.moments + max(self.sampling, self.update)


def count_weights(model_config: Any) -> Parts:
    """How many weights a model of that config has, without making them.

    Raises:
        ValueError: it is of no causal language model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    hold_frozen(model, torch.bfloat16)  # what that casts is castable

    def part(*modules: torch.nn.Module) -> Part:
        held = [p for module in modules for p in module.parameters()]
        return Part(sum(p.numel() for p in held), sum(p.numel() for p in held if p.dtype is torch.bfloat16))

    layers = layers_of(model)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    largest = max(map(part, layers), default=Part(0, 0))
    return Parts(part(model), part(model.base_model), part(*layers), largest, head.numel(), tied)


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
    updates = [case.policy_update(), *([case.critic_update()] if case.row.has_critic else [])]
    weights, moments, host = case.weights // case.share, case.moments, 0
    if on_gpu and case.sharded and config.distributed.cpu_offload:
        host = weights + moments + max(update.gradients for update in updates)
        weights, moments, updates = 0, 0, [update._replace(gradients=0) for update in updates]
    update = max(updates, key=sum)
    return Prediction(
        base=base,
        weights=weights,
        moments=moments,
        sampling=case.sampling(),
        copies=update.copies,
        gradients=update.gradients,
        activations=update.activations,
        heads=update.heads,
        rollout=case.rollout,
        host=host,
        opening=case.weights * processes if case.sharded else 0,
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
        self.config, self.row = config, find_algorithm(config.algorithm)
        self.shape, self.parts = model_config.get_text_config(), count_weights(model_config)
        self.size = getattr(torch, config.model.dtype).itemsize
        self.on_gpu, self.budget = on_gpu, logit_budget(on_gpu)
        self.sharded = config.distributed.strategy == "fsdp"
        self.share = processes if self.sharded else 1

        critic = config.critic
        self.own_trunk = self.row.has_critic and critic.trunk != "shared"
        self.adapter = adapter_parameters(model_config, config.model.lora)
        same = config.critic_lora == config.model.lora
        of_critic = self.adapter if same else adapter_parameters(model_config, config.critic_lora)
        self.critic_adapter = of_critic if self.own_trunk else 0
        self.trunk_learns = self.own_trunk and critic.trunk == "own" and not self.critic_adapter
        self.quantiles = critic.num_quantiles if self.row.has_law else 1
        predicted = critic.num_heads * self.quantiles
        self.outputs = {"none": 0, "vocabulary": self.shape.vocab_size}.get(self.row.critic, predicted)
        bases = critic.num_heads if critic.monotone and self.outputs and self.quantiles > 1 else 0
        self.heads = (self.shape.hidden_size + 1) * (self.outputs + bases)
        self.policy_learns = self.adapter or self.parts.model.number
        trunk = self.parts.trunk.number if self.trunk_learns else 0
        self.critic_learns = self.heads + self.critic_adapter + trunk

        sampling, update, evaluation = config.sampling, config.update, config.evaluation
        self.responses = ceil(sampling.prompts_per_step / processes) * sampling.samples_per_prompt
        self.judged = ceil(evaluation.prompts / processes) * max(1, evaluation.samples)
        self.response = sampling.max_completion_length
        self.length = sampling.max_prompt_length + self.response
        self.rows = min(update.microbatch_size, ceil(self.responses / update.minibatches))
        if update.max_tokens_per_microbatch:
            self.rows = max(1, min(self.rows, update.max_tokens_per_microbatch // self.length))

        shape = self.shape
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        self.inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
        self.queries = shape.num_attention_heads * head
        self.keys = (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) * head

    @property
    def weights(self) -> int:
        """Of all models, whole."""
        model, trunk = self.parts.model, self.parts.trunk
        policy = model.frozen(self.size) if self.adapter else FLOAT * model.number
        critic = FLOAT * trunk.number if self.trunk_learns else trunk.frozen(self.size)
        own = critic if self.own_trunk and not shares_base(self.config) else 0
        reference = model.frozen(self.size) if self.config.actor.kl.coef and not self.adapter else 0
        return policy + own + reference + FLOAT * (self.adapter + self.heads + self.critic_adapter)

    @property
    def moments(self) -> int:
        return 2 * FLOAT * (self.policy_learns + self.critic_learns) // self.share

    @property
    def rollout(self) -> int:
        """Values and targets of a step's tokens."""
        if not self.row.has_critic:
            return 0
        copies = 2 if self.config.advantage.recentre else 1  # as predicted, and moved
        laws = copies * self.config.critic.num_heads + LAWS
        return FLOAT * self.responses * self.response * laws * self.quantiles

    def policy_update(self) -> _Update:
        parts, size = self.parts, self.size
        logits = LOGIT_COPIES * FLOAT * min(self.rows * self.response * self.shape.vocab_size, self.budget)
        # Of the head each chunk makes a gradient: in the compute type, then in float32; sharded, it is added up in the
        # former. It casts the head if that is not gathered as it is.
        cast = size * parts.head if size < FLOAT and not self.sharded else 0
        gradient = (size if size < FLOAT else 0) + (size if self.sharded else FLOAT)
        head = cast + gradient * parts.head
        if self.adapter:
            head = cast if parts.tied else 0
        stream = size if self.sharded else FLOAT
        inputs, kept = self._activations(stream, bool(self.adapter))
        gathered = parts.model if self.sharded else parts.trunk  # else the head's cast is counted above
        copies = self._copies(gathered, size, not self.adapter, inputs, kept + logits + head)
        return _Update(copies, FLOAT * self.policy_learns // self.share, inputs + kept, logits + head)

    def critic_update(self) -> _Update:
        """Its heads are float32, and so is with `fsdp` what is gathered with them: embeddings, and what follows."""
        outputs = self.rows * self.response * self.outputs
        of_logits = self.row.critic == "vocabulary"
        terms = LOGIT_COPIES * FLOAT * min(outputs, self.budget) if of_logits else LOSS_COPIES * FLOAT * outputs
        learns = self.critic_learns > self.heads
        inputs, kept = self._activations(FLOAT, bool(self.critic_adapter)) if learns else (0, 0)
        copies = self._copies(self.parts.trunk, FLOAT, self.trunk_learns, inputs, kept + terms)
        return _Update(copies, FLOAT * self.critic_learns // self.share, inputs + kept, terms)

    def sampling(self) -> int:
        """The largest batch, of rows that have prompts of their own and all go on to the end."""
        settings, size, hidden = self.config.sampling, self.size, self.shape.hidden_size
        if settings.engine == "vllm":
            return 0
        rows = min(settings.batch_size, max(self.responses, self.judged))
        read = settings.max_prompt_length if self.config.task.name in ONE_TURN else self.length
        room = min(self.length, -(-read // RoomyLayer.GROWTH) * RoomyLayer.GROWTH)

        def cache(tokens: int) -> int:
            # Of one layer once more: while its buffers grow, and as every query's own, where rows have padding.
            return 2 * size * rows * tokens * (self.keys * (self.shape.num_hidden_layers + 1) + self.queries)

        reading = rows * read * (4 * FLOAT * hidden + 3 * size * self.inner)
        drawing = DRAW_COPIES * FLOAT * rows * self.shape.vocab_size
        if self.sharded:
            copies = size * self.parts.model.number
        else:
            copies = 0 if self.adapter else self.parts.model.casts(size)
            copies += size * self.parts.head if self.parts.tied and size < FLOAT else 0
        return copies + max(cache(room) + reading, cache(self.length) + drawing)

    def _activations(self, stream: int, fixed: bool) -> tuple[int, int]:
        """The inputs of the layers if these are computed again, and all else that a backward pass needs at a time.

        Args:
            stream: bytes of a number between the layers; float32 where embeddings and norms are.
            fixed: beside adapters.
        """
        hidden, layers, size = self.shape.hidden_size, self.shape.num_hidden_layers, self.size
        queries, keys, inner = self.queries, self.keys, self.inner
        # Query, key and value with their norms and rotations, repeated for the queries of a group; attention's result,
        # twice; gate, its activation, up, their product. Two norms: input, normalised, scaled; cast for five products
        # where the stream is wider. Norms and products whose weights do not learn keep less.
        products = 3 * queries + 3 * keys + 4 * inner if fixed else 7 * queries + 4 * keys + 4 * inner
        norms = 4 * stream if fixed else 6 * size if stream == size else 4 * stream + 5 * size
        layer = size * products + norms * hidden
        passing = FLOAT * (4 * hidden + 3 * inner)
        holes = HOLES if fixed and not self.on_gpu else 1.0
        tokens = self.rows * self.length
        again = self.config.model.gradient_checkpointing
        inputs = layers * hidden * stream if again else 0
        return round(holes * tokens * inputs), round(holes * tokens * ((1 if again else layers) * layer + passing))

    def _copies(self, part: Part, root: int, learns: bool, inputs: int, beside: int) -> int:
        """Copies of a module's weights while it is updated, and where it is sharded gradients before they are added.

        Args:
            part: the module without heads of its own.
            root: bytes of a weight outside the layers, as it is gathered.
            learns: whether all of it does.
            inputs: of layers that are computed again.
            beside: what a pass holds besides; it is gone when a forward pass ends, and when gradients of what is
                outside the layers are added, last.
        """
        layer = self.parts.layer
        if self.sharded:
            outside = part.number - self.parts.layers.number
            added = (root + FLOAT) * outside + (self.size + FLOAT) * layer.number if learns else 0
            return root * outside + 2 * self.size * layer.number + max(0, added - inputs - beside)
        if not learns:
            return 0
        if not self.config.model.gradient_checkpointing:
            return part.casts(self.size)
        # All casts are there when the forward pass ends, those of a layer while it is computed again.
        return max(part.casts(self.size) - beside, layer.casts(self.size))
