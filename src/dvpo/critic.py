"""The critic: light float32 heads on a transformer trunk that starts as a copy of the policy's."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from dvpo.batch import Rollout
from dvpo.checkpoint import latest_checkpoint
from dvpo.config import Config
from dvpo.core.categorical import histogram_centres
from dvpo.core.quantiles import quantile_levels
from dvpo.errors import InputError
from dvpo.frozen import hold_frozen, in_float32
from dvpo.heads import CategoricalHeads, ImplicitHeads, QuantileHeads, Verdict, VocabularyHead
from dvpo.lora import learning, merged, shares_base
from dvpo.parallel import inside, whole_state
from dvpo.policy import Policy, compute_type, first_line
from dvpo.prefix import hidden_states
from dvpo.recomputing import recompute, recomputes
from dvpo.settings_learning import CriticConfig

Kind = Literal["scalar", "quantile", "implicit", "categorical", "vocabulary"]


@dataclass(frozen=True)
class CriticShape:
    """All that is needed to rebuild a critic around a trunk's config."""

    kind: Kind
    trunk: Literal["own", "frozen", "shared"]
    hidden_size: int
    num_heads: int
    num_quantiles: int
    levels: Literal["midpoint", "paper"]
    monotone: bool
    vocabulary: int = 0
    """Of a vocabulary critic; it has one head, and M = 1."""
    start: Literal["random", "verdict"] = "random"
    features: bool = False
    bins: int = 0
    """Of a categorical critic; where they stand is kept with the weights."""


FEATURES = 2
"""Log-prob and entropy of the token before."""


class Critic(nn.Module):
    """Value predictions [..., N, M] at every state; a scalar critic is the case M = 1, and so are the expected
    action values of a vocabulary critic.

    trunk `own`: a copy of the policy's trunk, trained; `frozen`: the same, kept; `shared`: none of its own, the heads
    read the policy's hidden states without sending a gradient into them.
    """

    def __init__(self, shape: CriticShape, trunk: nn.Module | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.trunk = trunk
        if trunk is not None and shape.trunk == "frozen":
            trunk.requires_grad_(False)
        inputs = shape.hidden_size + FEATURES * shape.features
        self.heads = _make_heads(shape, inputs)
        self.verdict = Verdict(shape.hidden_size, shape.num_heads) if shape.start == "verdict" else None

    def forward(self, states_D: Tensor) -> Tensor:
        """Predictions [..., N, M] from what `states` gives: the heads', around the verdict where there is one."""
        return self._around_verdict(self.heads(states_D), states_D)

    def _around_verdict(self, theta_NM: Tensor, states_D: Tensor) -> Tensor:
        return theta_NM if self.verdict is None else theta_NM + self.verdict(states_D[..., : self.shape.hidden_size])

    def values(self, states_BUD: Tensor, rollout: Rollout, policy: Policy, temperature: float) -> Tensor:
        """What the states are worth: [B, U, N, M].

        Args:
            states_BUD: hidden states at the U = T + 1 states of each response, before every token and at the end.
            rollout: those responses.
            policy: whose next token the value of a vocabulary critic expects.
            temperature: as at sampling.
        """
        if not isinstance(self.heads, VocabularyHead):
            values_BUNM: Tensor = self(states_BUD)
            return values_BUNM
        heads = self.heads

        def expected() -> Tensor:
            policy_BUD = policy.hidden_states(rollout.tokens_BS, rollout.attention_BS, rollout.prompt_length - 1)
            return heads.expected(states_BUD.flatten(0, 1), policy_BUD.flatten(0, 1), policy, temperature)

        return inside(policy.model, expected).view(*states_BUD.shape[:2], 1, 1)

    @property
    def predicts_values(self) -> bool:
        """Whether the critic's loss is about the values themselves."""
        return isinstance(self.heads, QuantileHeads)

    def predictions(self, states_KD: Tensor, tokens_K: Tensor) -> Tensor:
        """What the critic's loss is about, from the states before the tokens: [K, N, M].

        These are the values; or, in place of M, the pair Q(taken), logsumexp_a Q of a vocabulary critic or the logits
        of a categorical one's bins; or the quantiles at the levels last drawn of an implicit critic, with these levels
        as one head more.
        """
        if isinstance(self.heads, VocabularyHead):
            return self.heads.taken_and_soft_maximum(states_KD, tokens_K).unsqueeze(-2)
        if isinstance(self.heads, CategoricalHeads):
            return self.heads.logits(states_KD)
        if isinstance(self.heads, ImplicitHeads):
            drawn_M = self.heads.drawn_M
            theta_KNM = self._around_verdict(self.heads(states_KD, drawn_M), states_KD)
            return torch.cat([theta_KNM, drawn_M.expand(len(theta_KNM), 1, -1)], dim=1)
        predictions_KNM: Tensor = self(states_KD)
        return predictions_KNM

    def states(self, rollout: Rollout, policy: Policy) -> Tensor:
        """What the heads read at the T + 1 states of each response, before every token and at the end: [B, U, D].

        With `features` two columns more: the log-prob of the token before, and the entropy of the distribution that
        it was drawn from; 0 before the first token and after a token that is not the policy's.
        """
        hint_BH = rollout.hints_BH >= 0
        # The gap between hint and prompt does no harm: positions count real tokens, attention sees no others.
        tokens_BS = torch.cat([rollout.hints_BH.clamp(min=0), rollout.tokens_BS], dim=1)
        attention_BS = torch.cat([hint_BH, rollout.attention_BS], dim=1)
        first = hint_BH.shape[1] + rollout.prompt_length - 1
        states_BUD = self.hidden_states(tokens_BS, attention_BS, policy, first)
        if not self.shape.features:
            return states_BUD
        features_BT2 = torch.stack([rollout.sampler_logprobs_BT, rollout.entropies_BT], dim=-1)
        # Shifted by one: what is known of token t is known in the state that follows it.
        return torch.cat([states_BUD.float(), F.pad(features_BT2, (0, 0, 1, 0))], dim=-1)

    def draw_levels(self, *key: str | int) -> None:
        """Draw the levels that an implicit critic is trained at; of other critics they are fixed."""
        if isinstance(self.heads, ImplicitHeads):
            self.heads.draw(*key)

    def learn_verdict_alone(self, alone: bool) -> None:
        """Let the verdict's scale and bias learn and nothing else, or all the rest and not them."""
        if self.verdict is None:
            return
        for parameter in self._learning:
            parameter.requires_grad_(not alone)
        self.verdict.moved.requires_grad_(alone)

    @property
    def _learning(self) -> Iterator[nn.Parameter]:
        """Parameters that learn once scale and bias are done."""
        assert self.verdict is not None
        if self.trunk is not None and self.shape.trunk == "own":
            yield from learning(self.trunk)
        yield from self.heads.parameters()
        yield self.verdict.direction

    def hidden_states(self, tokens_BS: Tensor, attention_BS: Tensor, policy: Policy, first: int = 0) -> Tensor:
        """Hidden states [B, S - first, D] that the heads read; the policy's, detached, where the trunk is shared."""
        if self.trunk is None:
            with torch.no_grad():
                return policy.hidden_states(tokens_BS, attention_BS, first)
        with compute_type(self.dtype, tokens_BS.device):
            return hidden_states(self.trunk, tokens_BS, attention_BS, first)

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write `critic.safetensors` with adapters added to the weights, `critic.json` and the trunk's `config.json`.

        Args:
            folder: made if it is not there.
            tensors: the whole state, where this module holds a shard of it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = in_float32(merged(self, self.state_dict() if tensors is None else dict(tensors)))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "critic.safetensors")
        (folder / "critic.json").write_text(json.dumps(asdict(self.shape), indent=2) + "\n")
        if self.trunk is not None:
            trunk: Any = self.trunk
            trunk.config.save_pretrained(folder)

    def writer(self) -> Callable[[Path], None]:
        """What saves it; every process must ask for it, one of them may use it."""
        return partial(self.save, tensors=whole_state(self))


def _make_heads(shape: CriticShape, inputs: int) -> nn.Module:
    match shape.kind:
        case "vocabulary":
            return VocabularyHead(inputs, shape.vocabulary)
        case "categorical":
            return CategoricalHeads(inputs, shape.num_heads, shape.num_quantiles, torch.zeros(shape.bins))
        case "implicit":
            return ImplicitHeads(inputs, shape.num_heads, quantile_levels(shape.num_quantiles, shape.levels))
        case "scalar" | "quantile":
            return QuantileHeads(inputs, shape.num_heads, shape.num_quantiles, shape.monotone)


def open_critic(kind: Kind | Literal["none"], config: Config, policy: Policy, checkpoint: Path | None) -> Critic | None:
    """A run's critic: from a checkpoint, or as it is before training; None for an algorithm without one.

    A run with adapters resumes from the critic as it was before training, whose form the checkpoint's must still have.

    Raises:
        InputError: as `load_critic` and `make_critic`, or the config asks for another form than the checkpoint's.
    """
    if kind == "none":
        return None
    if checkpoint is not None:
        _refuse_another_form(checkpoint / "critic", kind, config.critic)
    if checkpoint is None or config.model.lora.rank:
        critic = make_critic(kind, config.critic, policy, shares_base(config))
    else:
        critic = load_critic(checkpoint / "critic", policy.device, policy.dtype, config.model.gradient_checkpointing)
    if critic.trunk is not None and (config.critic.trunk == "frozen" or config.critic_lora.rank):
        hold_frozen(critic.trunk, policy.dtype)
    return critic


def _refuse_another_form(
    folder: Path,
    kind: Kind,
    config: CriticConfig,
    whose: str = "the checkpoint's critic",
    remedy: str = "start another output folder",
) -> None:
    """A run may go on with other settings of the critic, but the weights that it goes on with have their form."""
    shape = critic_shape(folder)
    now = asdict(_shape(kind, config, shape.hidden_size, shape.vocabulary))
    for name, old in asdict(shape).items():
        if old != now[name]:
            raise InputError(
                f"{'the critic of algorithm' if name == 'kind' else f'critic.{name}'} = {now[name]}: {whose} has "
                f"{old}, and its form stays: take that value, or {remedy}"
            )
    if kind == "categorical":
        with _readable(folder), safe_open(folder / "critic.safetensors", "pt") as file:
            centres_R = file.get_tensor("heads.centres_R")
        if not torch.allclose(centres_R, histogram_centres(**asdict(config.histogram)).to(centres_R.dtype)):
            raise InputError(
                f"critic.histogram: {whose} has its bins elsewhere, and they stay: take its values, or {remedy}"
            )


def _shape(kind: Kind, config: CriticConfig, hidden_size: int, vocabulary: int) -> CriticShape:
    return CriticShape(
        kind=kind,
        trunk=config.trunk,
        hidden_size=hidden_size,
        num_heads=1 if kind == "vocabulary" else config.num_heads,
        num_quantiles=1 if kind in ("scalar", "vocabulary") else config.num_quantiles,
        levels=config.levels,
        monotone=config.monotone,
        vocabulary=vocabulary if kind == "vocabulary" else 0,
        start=config.start,
        features=config.features,
        bins=len(histogram_centres(**asdict(config.histogram))) if kind == "categorical" else 0,
    )


def make_critic(kind: Kind, config: CriticConfig, policy: Policy, share_base: bool = False) -> Critic:
    """A critic before training: a fresh one around a copy of the policy's trunk, whose heads are drawn from torch's
    global generator; or, with `critic.path`, around a reward model's, or an earlier run's critic as it was.

    Args:
        kind: what its heads are.
        config: the section.
        policy: before it has adapters.
        share_base: let the copy have the policy's own weights, which neither of them is to train.

    Raises:
        InputError: `critic.verdict_tokens` that are no tokens, or a `critic.path` without a reward model that reads
            what the policy writes, or with a critic of another form.
    """
    folder = None if config.path is None else Path(config.path).expanduser()
    if folder is not None:
        if (folder / "critic.json").is_file():
            return _earlier_critic(folder, kind, config, policy)
        below = (latest_checkpoint(folder) or folder) / "critic"
        if (below / "critic.json").is_file():
            raise InputError(f"critic.path = {config.path} is a run or a checkpoint of one: name its critic, {below}")
    trunk: Any = None if config.path is None else _trunk_of_reward_model(config.path, config, policy)
    width = policy.model.get_output_embeddings().weight.shape[1]
    if trunk is not None:
        width = trunk.config.get_text_config().hidden_size
    shape = _shape(kind, config, width, policy.vocabulary)
    if trunk is None and config.trunk != "shared":
        trunk = copy.deepcopy(policy.trunk, {id(p): p for p in policy.trunk.parameters()} if share_base else {})
        trunk = trunk if share_base else trunk.float().requires_grad_(True)  # the policy's may be held frozen
    critic = Critic(shape, trunk, policy.dtype)
    if isinstance(critic.heads, CategoricalHeads):
        critic.heads.centres_R.copy_(histogram_centres(**asdict(config.histogram)))
    critic.to(policy.device).train(policy.model.training)
    if critic.verdict is not None:
        critic.verdict.read_off(policy, config.verdict_tokens)
    return critic


def _earlier_critic(folder: Path, kind: Kind, config: CriticConfig, policy: Policy) -> Critic:
    _refuse_another_form(folder, kind, config, f"the critic of critic.path = {folder}", "drop critic.path")
    checkpointing = recomputes(policy.trunk)
    critic = load_critic(folder, policy.device, policy.dtype, checkpointing)
    trunks: tuple[Any, Any] = (critic.trunk, policy.trunk)
    reads, writes = (len(trunk.get_input_embeddings().weight) for trunk in trunks)
    if reads != writes:
        raise InputError(
            f"critic.path = {folder}: the critic has {reads} tokens, the policy {writes}: take a critic of a run that "
            "began with the same model"
        )
    return critic


def _trunk_of_reward_model(folder: str, config: CriticConfig, policy: Policy) -> nn.Module:
    from dvpo.reward_model import open_reward_model

    if config.start == "verdict":
        raise InputError(
            f"critic.path = {folder} is a reward model, and critic.start = verdict reads the policy's trunk: drop one "
            "of them"
        )
    model = open_reward_model(folder, policy.device, field="critic.path")
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise InputError(
            f"critic.path = {folder}: the reward model's tokenizer is not the policy's, whose tokens a critic reads: "
            "take one trained from the same family"
        )
    trunk: Any = model.model.base_model
    if recomputes(policy.trunk):
        recompute(trunk)
    return trunk


def load_critic(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    attention: str | None = None,
) -> Critic:
    """Load a critic saved by `Critic.save` (the `critic/` folder of a checkpoint).

    Args:
        folder: the critic's folder.
        device: where it lives.
        dtype: compute type of its trunk.
        gradient_checkpointing: recompute the trunk's activations in the backward pass.
        attention: implementation of the trunk's attention; None: transformers' choice.

    Raises:
        InputError: files missing, or weights that do not fit.
    """
    critic = blank_critic(folder, dtype, gradient_checkpointing, attention)
    with _readable(folder):
        critic.load_state_dict(load_file(Path(folder) / "critic.safetensors"))
    return critic.to(device)


def blank_critic(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    attention: str | None = None,
) -> Critic:
    """A critic of the same shape with fresh weights: for a process that is sent them by another.

    Args, Raises: as `load_critic`.
    """
    shape = critic_shape(folder)
    with _readable(folder):
        trunk = None
        if shape.trunk != "shared":
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            trunk = AutoModel.from_config(config, attn_implementation=attention)
            if gradient_checkpointing:
                recompute(trunk)
        return Critic(shape, trunk, dtype).train(gradient_checkpointing)


def critic_shape(folder: str | Path) -> CriticShape:
    """What is said of a saved critic beside its weights.

    Raises:
        InputError: no critic there.
    """
    with _readable(folder):
        return CriticShape(**json.loads((Path(folder) / "critic.json").read_text()))


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"critic folder {folder} cannot be read ({first_line(error)}): give the critic/ folder of a checkpoint"
        ) from None
