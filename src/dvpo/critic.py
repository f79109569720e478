"""The critic: light float32 heads on a transformer trunk that starts as a copy of the policy's."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from dvpo.batch import Rollout
from dvpo.config import CriticConfig
from dvpo.errors import InputError
from dvpo.policy import Policy, compute_type, in_chunks
from dvpo.prefix import hidden_states

Kind = Literal["scalar", "quantile", "vocabulary"]


class QuantileHeads(nn.Module):
    """N independent linear heads of M quantiles: hidden states [..., D] -> [..., N, M], float32.

    `monotone`: non-crossing by construction (cf. Zhou et al. 2020),

        theta_j = base + (c_j - mean_j c_j) / M,   c_j = sum_{k <= j} softplus(x_k)

    so that `base` is the head's mean and x its shape. At the start base = 0 and the quantiles are spread evenly over
    one unit of reward; a plain head starts at 0 everywhere. With M = 1 both are a scalar head.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_quantiles: int, monotone: bool) -> None:
        super().__init__()
        self.num_heads, self.num_quantiles = num_heads, num_quantiles
        self.monotone = monotone and num_quantiles > 1
        outputs = num_quantiles + self.monotone
        self.linear = nn.Linear(hidden_size, num_heads * outputs, dtype=torch.float32)
        # Small, not zero: heads must differ from each other for their disagreement to mean anything.
        nn.init.normal_(self.linear.weight, std=0.01 / math.sqrt(hidden_size))
        nn.init.zeros_(self.linear.bias)
        if self.monotone:
            with torch.no_grad():
                self.linear.bias.view(num_heads, outputs)[:, 1:] = math.log(math.e - 1)  # softplus = 1

    def forward(self, hidden_D: Tensor) -> Tensor:
        with torch.autocast(hidden_D.device.type, enabled=False):
            out = self.linear(hidden_D.float()).unflatten(-1, (self.num_heads, -1))
            if not self.monotone:
                return out
            base, shape = out[..., :1], out[..., 1:]
            steps = F.softplus(shape).cumsum(dim=-1) / self.num_quantiles
            return base + steps - steps.mean(dim=-1, keepdim=True)


class VocabularyHead(nn.Module):
    """Q(s, a) for every token a of the vocabulary: hidden states [..., D] -> [..., V], float32.

    Nobody needs all of it at once, so what is read off is computed in chunks and no [B, T, V] tensor is made.
    """

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, vocabulary, dtype=torch.float32)
        nn.init.normal_(self.linear.weight, std=0.01 / math.sqrt(hidden_size))
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_D: Tensor) -> Tensor:
        with torch.autocast(hidden_D.device.type, enabled=False):
            actions_V: Tensor = self.linear(hidden_D.float())
            return actions_V

    def taken_and_soft_maximum(self, hidden_KD: Tensor, tokens_K: Tensor) -> Tensor:
        """Q(s, a) of the token that was taken, and logsumexp_a Q(s, a): [K, 2]."""

        def one(hidden_CD: Tensor, tokens_C: Tensor) -> tuple[Tensor, Tensor]:
            actions_CV = self(hidden_CD)
            return actions_CV.gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1), actions_CV.logsumexp(dim=-1)

        return torch.stack(in_chunks(one, self.linear.out_features, hidden_KD, tokens_K), dim=-1)

    @torch.no_grad()
    def expected(self, hidden_KD: Tensor, policy_KD: Tensor, policy: Policy, temperature: float) -> Tensor:
        """V(s) = sum_a pi(a|s) Q(s, a), from the head's and the policy's hidden states: [K], without gradient."""

        def one(hidden_CD: Tensor, policy_CD: Tensor) -> tuple[Tensor]:
            chances_CV = (policy.logits(policy_CD) / temperature).softmax(dim=-1)
            return ((chances_CV * self(hidden_CD)).sum(dim=-1),)

        return in_chunks(one, self.linear.out_features, hidden_KD, policy_KD)[0]


class Verdict(nn.Module):
    """The starting model's own opinion as a value: hidden states [..., D] -> [..., N, 1], float32.

        V = bias + scale * sigmoid(w h + c),   w h + c = logit of success - logit of failure

    Scale and bias stand outside the sigmoid, since noise acts there: under false positives p and false negatives q a
    true success probability v is observed as p + (1 - p - q) v. They learn first and alone, the direction w later.
    """

    REACH = 30.0
    """AdamW moves a weight by its learning rate a step, whatever the gradient; scale and bias have farther to go."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros(()))
        self.moved = nn.Parameter(torch.zeros(2, num_heads, dtype=torch.float32))
        self.offset: Tensor

    def forward(self, hidden_D: Tensor) -> Tensor:
        with torch.autocast(hidden_D.device.type, enabled=False):
            opinion = torch.sigmoid(hidden_D.float() @ self.direction + self.offset)
            scale_N, bias_N = 1 + self.REACH * self.moved[0], self.REACH * self.moved[1]
            return (bias_N + scale_N * opinion.unsqueeze(-1)).unsqueeze(-1)

    @torch.no_grad()
    def read_off(self, policy: Policy, tokens: tuple[str, str]) -> None:
        """Take the direction from the policy's language-model head (a cap behind it is left out).

        Raises:
            InputError: a text that is not one token.
        """
        ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in tokens]
        for text, pieces in zip(tokens, ids, strict=True):
            if len(pieces) != 1:
                raise InputError(
                    f"critic.verdict_tokens: {text!r} is {len(pieces)} tokens of this model: take a text that is one"
                )
        head, ((good,), (bad,)) = policy.model.get_output_embeddings(), ids
        self.direction.copy_(policy.logit_scale * (head.weight[good] - head.weight[bad]))
        if getattr(head, "bias", None) is not None:
            self.offset.copy_(policy.logit_scale * (head.bias[good] - head.bias[bad]))


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
        self.heads: QuantileHeads | VocabularyHead
        if shape.kind == "vocabulary":
            self.heads = VocabularyHead(inputs, shape.vocabulary)
        else:
            self.heads = QuantileHeads(inputs, shape.num_heads, shape.num_quantiles, shape.monotone)
        self.verdict = Verdict(shape.hidden_size, shape.num_heads) if shape.start == "verdict" else None

    def forward(self, states_D: Tensor) -> Tensor:
        """Predictions [..., N, M] from what `states` gives: the heads', around the verdict where there is one."""
        theta_NM: Tensor = self.heads(states_D)
        return theta_NM if self.verdict is None else theta_NM + self.verdict(states_D[..., : self.shape.hidden_size])

    def values(self, states_BUD: Tensor, rollout: Rollout, policy: Policy, temperature: float) -> Tensor:
        """What the states are worth: [B, U, N, M].

        Args:
            states_BUD: hidden states at the U = T + 1 states of each response, before every token and at the end.
            rollout: those responses.
            policy: whose next token the value of a vocabulary critic expects.
            temperature: as at sampling.
        """
        if isinstance(self.heads, QuantileHeads):
            values_BUNM: Tensor = self(states_BUD)
            return values_BUNM
        policy_BUD = policy.hidden_states(rollout.tokens_BS, rollout.attention_BS, rollout.prompt_length - 1)
        values_K = self.heads.expected(states_BUD.flatten(0, 1), policy_BUD.flatten(0, 1), policy, temperature)
        return values_K.view(*states_BUD.shape[:2], 1, 1)

    def predictions(self, states_KD: Tensor, tokens_K: Tensor) -> Tensor:
        """What the critic's loss is about, from the states before the tokens: [K, N, M].

        These are the values, or the pair Q(taken), logsumexp_a Q in place of M for a vocabulary critic.
        """
        if isinstance(self.heads, VocabularyHead):
            return self.heads.taken_and_soft_maximum(states_KD, tokens_K).unsqueeze(-2)
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
            yield from self.trunk.parameters()
        yield from self.heads.parameters()
        yield self.verdict.direction

    def hidden_states(self, tokens_BS: Tensor, attention_BS: Tensor, policy: Policy, first: int = 0) -> Tensor:
        """Hidden states [B, S - first, D] that the heads read; the policy's, detached, where the trunk is shared."""
        if self.trunk is None:
            with torch.no_grad():
                return policy.hidden_states(tokens_BS, attention_BS, first)
        with compute_type(self.dtype, tokens_BS.device):
            return hidden_states(self.trunk, tokens_BS, attention_BS, first)

    def save(self, folder: Path) -> None:
        """Write `critic.safetensors`, `critic.json` and the trunk's `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "critic.safetensors")
        (folder / "critic.json").write_text(json.dumps(asdict(self.shape), indent=2) + "\n")
        if self.trunk is not None:
            trunk: Any = self.trunk
            trunk.config.save_pretrained(folder)


def make_critic(kind: Kind, config: CriticConfig, policy: Policy) -> Critic:
    """A fresh critic around a copy of the policy's trunk; draws its heads from torch's global generator.

    Raises:
        InputError: `critic.verdict_tokens` that are no tokens.
    """
    shape = CriticShape(
        kind=kind,
        trunk=config.trunk,
        hidden_size=policy.model.get_output_embeddings().weight.shape[1],
        num_heads=1 if kind == "vocabulary" else config.num_heads,
        num_quantiles=config.num_quantiles if kind == "quantile" else 1,
        levels=config.levels,
        monotone=config.monotone,
        vocabulary=policy.vocabulary if kind == "vocabulary" else 0,
        start=config.start,
        features=config.features,
    )
    trunk = None if config.trunk == "shared" else copy.deepcopy(policy.trunk)
    critic = Critic(shape, trunk, policy.dtype).to(policy.device).train(policy.model.training)
    if critic.verdict is not None:
        critic.verdict.read_off(policy, config.verdict_tokens)
    return critic


def load_critic(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> Critic:
    """Load a critic saved by `Critic.save` (the `critic/` folder of a checkpoint).

    Args:
        folder: the critic's folder.
        device: where it lives.
        dtype: compute type of its trunk.
        gradient_checkpointing: recompute the trunk's activations in the backward pass.

    Raises:
        InputError: files missing, or weights that do not fit.
    """
    folder = Path(folder)
    try:
        shape = CriticShape(**json.loads((folder / "critic.json").read_text()))
        tensors = load_file(folder / "critic.safetensors")
        trunk = None
        if shape.trunk != "shared":
            trunk = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
            if gradient_checkpointing:
                trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        critic = Critic(shape, trunk, dtype)
        critic.load_state_dict(tensors)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"critic folder {folder} cannot be read ({reason}): give the critic/ folder of a checkpoint"
        ) from None
    return critic.to(device).train(gradient_checkpointing)
