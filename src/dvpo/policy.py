"""The policy: load or make a causal language model, and its log-probs without a [B, T, V] float32 tensor."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from dvpo.batch import Rollout
from dvpo.checkpoint import latest_checkpoint
from dvpo.core.masks import rows_where
from dvpo.errors import InputError
from dvpo.frozen import hold_frozen, in_float32
from dvpo.lora import merged, without_adapters
from dvpo.parallel import inside, whole_state
from dvpo.prefix import hidden_states
from dvpo.recomputing import recompute

# Loading bars of single files would tear the progress display.
disable_progress_bar()

LOGIT_BUDGET = 1 << 24
"""Logits held at once while log-probs are computed (64 MiB in float32)."""
GPU_LOGITS = 8
"""So many times as many on a GPU, where every piece casts the whole head and adds a gradient of its size."""


UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError)
"""What transformers raises where it cannot load a folder."""


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer; weights that learn are float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype = torch.float32
    """Compute type of the trunk and of the language-model head's product; logits, log-probs and losses are float32."""
    home: torch.device | None = None
    """Where it computes, if not where its weights are kept."""
    adapted: bool = True
    """False: as it was before training, without its adapters if it has any."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """What its chat template is told besides the messages."""

    @property
    def device(self) -> torch.device:
        return self.model.device if self.home is None else self.home

    @property
    def trunk(self) -> nn.Module:
        """The transformer without its language-model head."""
        return self.model.base_model

    @property
    def context_length(self) -> int:
        """Positions the model can attend to."""
        return context_of(self.model)

    @property
    def vocabulary(self) -> int:
        """Logits of the language-model head, those of padded entries included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a turn: the tokenizer's and the generation config's."""
        ids: set[int] = set()
        for value in (self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id):
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
        return frozenset(ids)

    @property
    def pad_id(self) -> int:
        """What fills padded places; it may equal an end id, since ends are recorded by the sampler."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else min(self.end_ids, default=0))

    def autocast(self) -> AbstractContextManager[Any]:
        # Asked at every token that is sampled, and a model looks for its device among all its parameters.
        return nullcontext() if self.dtype is torch.float32 else compute_type(self.dtype, self.device)

    def hidden_states(self, tokens_BS: Tensor, attention_BS: Tensor, first: int = 0) -> Tensor:
        """Last hidden states from column `first` on, the last one of the prompts: [B, S - first, D]."""

        def states() -> Tensor:
            with nullcontext() if self.adapted else without_adapters(self.model):
                return hidden_states(self.trunk, tokens_BS, attention_BS, first)

        with self.autocast():
            return inside(self.model, states)

    @cached_property
    def logit_scale(self) -> float:
        """What the model family multiplies its logits by; `check_head` refuses one that does anything unknown."""
        config = self.model.config.get_text_config()
        return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    @cached_property
    def logit_cap(self) -> float | None:
        """Bound that a tanh keeps the logits within, where the family has one."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """float32 logits [K, V] of given hidden states, as the model's own forward computes them.

        Whoever calls it on a sharded model is `parallel.inside` it.
        """
        with self.autocast():
            logits_KV = self.model.get_output_embeddings()(hidden_KD).float()
        if self.logit_scale != 1.0:
            logits_KV = logits_KV * self.logit_scale
        return torch.tanh(logits_KV / self.logit_cap) * self.logit_cap if self.logit_cap else logits_KV

    def token_logprobs(
        self, hidden_KD: Tensor, tokens_K: Tensor, temperature: float = 1.0, entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies under the temperature-scaled distribution.

            log p(y) = z_y - logsumexp(z),   H = logsumexp(z) - sum_v p_v z_v,   z = logits / temperature

        Args:
            hidden_KD: hidden state of the column *before* each token.
            tokens_K: int64 tokens.
            temperature: as at sampling.
            entropy: whether the entropy needs a gradient; without one it is only reported.

        Returns:
            (logprobs_K, entropies_K) in nats, float32.
        """

        def one(hidden_CD: Tensor, tokens_C: Tensor) -> tuple[Tensor, Tensor]:
            logits_CV = self.logits(hidden_CD) / temperature
            total_C = logits_CV.logsumexp(dim=-1)
            logprobs_C = logits_CV.gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1) - total_C
            with torch.set_grad_enabled(entropy and torch.is_grad_enabled()):
                p_CV = (logits_CV - total_C.unsqueeze(-1)).exp()
                entropies_C = total_C - (p_CV * logits_CV).sum(dim=-1)
            return logprobs_C, entropies_C

        logprobs_K, entropies_K = in_chunks(one, self.vocabulary, hidden_KD, tokens_K)
        return logprobs_K, entropies_K

    def response_logprobs(
        self, rollout: Rollout, mask_BT: Tensor, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`token_logprobs` of the masked tokens of a rollout's responses; on a sharded model `parallel.inside` it."""
        # The last token's own state predicts nothing.
        states_BTD = self.hidden_states(
            rollout.tokens_BS[:, :-1], rollout.attention_BS[:, :-1], rollout.prompt_length - 1
        )
        return self.token_logprobs(rows_where(states_BTD, mask_BT), rollout.response_BT[mask_BT], temperature, entropy)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder, with adapters added to the weights."""
        self.writer()(folder)

    def writer(self) -> Callable[[Path], None]:
        """What writes that folder; every process must ask for it, one of them may use it."""
        state = whole_state(self.model)

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder, state_dict=in_float32(merged(self.model, state)))
            self.tokenizer.save_pretrained(folder)

        return write


def context_of(model: Any) -> int:
    """Positions a transformers model can attend to."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))


def first_line(error: Exception) -> str:
    """What it says first, or its name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def logit_budget(on_gpu: bool) -> int:
    """Logits held at once."""
    return LOGIT_BUDGET * (GPU_LOGITS if on_gpu else 1)


def in_chunks(function: Callable[..., tuple[Tensor, ...]], vocabulary: int, *tensors_K: Tensor) -> tuple[Tensor, ...]:
    """Apply a function that works token by token to at most `logit_budget` logits at once.

    Each chunk is recomputed in the backward pass when there is more than one: memory grows with the chunk, not with
    K * V.
    """
    chunk = max(1, logit_budget(tensors_K[0].is_cuda) // vocabulary)
    if len(tensors_K[0]) <= chunk:
        return function(*tensors_K)
    pieces = zip(*(tensor.split(chunk) for tensor in tensors_K), strict=True)
    parts = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def compute_type(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to `dtype`, or nothing for float32: weights that learn stay float32 either way."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


def open_policy(
    path: str | Path,
    device: torch.device,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    weights: Literal["pretrained", "random"] = "pretrained",
    template: Mapping[str, Any] = {},
    learns: bool = True,
) -> Policy:
    """Load a Hugging Face folder (or hub name) as a `Policy`; dropout off, no remote code.

    Args:
        path: a folder written by `save_pretrained` (model and tokenizer), or a hub name.
        device: where it lives.
        dtype: compute type of the trunk, `float32` or `bfloat16`; weights that learn are float32 either way.
        gradient_checkpointing: recompute activations in the backward pass.
        weights: `random` makes the model from the folder's config.json, drawn from torch's global generator.
        template: what the chat template is told besides the messages.
        learns: False where none of these weights will change, whatever is put beside them (`hold_frozen`).

    Raises:
        InputError: no such folder, no causal language model in it, no tokenizer, no end token, a chat template that
            does not read what it is told, or a family whose head is not supported.
    """
    path = str(path)
    source = _source(path)
    local = Path(source)
    try:
        model_config = without_dropout(AutoConfig.from_pretrained(source, trust_remote_code=False))
        if weights == "random":
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, trust_remote_code=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source, config=model_config, dtype=torch.float32, trust_remote_code=False
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UNREADABLE as error:
        trained = (latest_checkpoint(local) or local) / "policy"
        if trained.is_dir():
            raise InputError(
                f"model.path = {path} is a run or a checkpoint of one: name its model, {trained}"
            ) from None
        fetch = "" if local.is_dir() else f"fetch it where there is a network (hf download {path}), or "
        raise InputError(
            f"model.path = {path} cannot be loaded as a causal language model with its tokenizer "
            f"({first_line(error)}): {fetch}give a folder written by save_pretrained"
        ) from None
    if not learns:  # before it is moved: whole, in float32, it may not fit the device
        hold_frozen(model, getattr(torch, dtype))
    if gradient_checkpointing:
        recompute(model)
    # transformers checkpoints in training mode only; with every dropout at 0 the mode changes nothing else.
    policy = Policy(model.to(device).train(gradient_checkpointing), tokenizer, getattr(torch, dtype), template=template)
    # Several families make an empty tokenizer where there are no files for one.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"model.path = {path} has no tokenizer: write one there with tokenizer.save_pretrained")
    if not policy.end_ids:
        raise InputError(f"model.path = {path} has no end token: set eos_token in its tokenizer")
    # A template ignores what it does not read, a misspelt name say, and of what it reads rendering sets a part itself.
    ours = {"messages", *signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
    for name, value in template.items():
        if name in ours or name not in str(tokenizer.chat_template or ""):
            raise InputError(
                f"model.template.{name} = {value!r:.60}: the chat template of {path} reads no {name} that can be set: "
                "check the name, or drop it"
            )
    check_head(policy)
    return policy


def _source(path: str) -> str:
    """What transformers loads: a folder, or a hub name."""
    local = Path(path).expanduser()
    looks_local = local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
    if looks_local and not local.is_dir():
        raise InputError(f"model.path = {path} is no folder: give a folder with config.json and weights, or a hub name")
    return str(local) if local.is_dir() else path


def shape_of(path: str | Path) -> Any:
    """The config of a model, of which nothing else is loaded.

    Raises:
        InputError: no such folder, or no sound config.json in it.
    """
    source = _source(str(path))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a family's config checks itself, and raises what it likes
        fetch = "" if Path(source).is_dir() else f"; hf download {path} config.json --local-dir FOLDER fetches it alone"
        raise InputError(
            f"model.path = {path} has no config.json that transformers reads ({first_line(error)}): give a folder with "
            f"one, weights are not needed{fetch}; configs/shapes/ holds some"
        ) from None


def without_dropout(config: Any) -> Any:
    """Set every dropout probability and router jitter of a transformers config to 0: ratios of one policy must be 1."""
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Compare `logits(hidden_states)` with the model's own forward on a short probe.

    Raises:
        InputError: the family does something behind its trunk that `Policy.logits` does not know, or returns no cache.
    """
    tokens_BS = torch.arange(8, device=policy.device).remainder(policy.vocabulary).unsqueeze(0)
    attention_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    with policy.autocast():
        out = policy.model(input_ids=tokens_BS, attention_mask=attention_BS.long(), use_cache=False)
        remembers = hasattr(policy.trunk(input_ids=tokens_BS, use_cache=True), "past_key_values")
    expected = out.logits.float()
    ours = policy.logits(policy.hidden_states(tokens_BS, attention_BS)[0])
    # bf16 autocast of the same computation agrees closely; a missing scale or cap does not.
    if not torch.allclose(ours, expected[0], rtol=0.02, atol=0.02 * float(expected.abs().max())):
        kind = type(policy.model).__name__
        raise InputError(
            f"model.path: {kind} transforms its logits in a way dvpo does not know: open an issue naming {kind}"
        )
    if not remembers:
        kind = type(policy.model).__name__
        raise InputError(f"model.path: {kind} does not hand on what it has read, so it cannot be sampled from here")


def choose_device(name: str) -> str:
    """`auto` is a GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise InputError(f"device = {name} is none that torch knows: take auto, cpu, cuda or cuda:N") from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device = {name}, but torch sees no GPU: take device=cpu, or install a CUDA build of torch")
    return name
