"""What a critic's trunk ends in: light float32 heads, a kind of value each, and the starting model's verdict."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvpo.core.categorical import categorical_atoms
from dvpo.core.monotone import monotone_quantiles
from dvpo.errors import InputError
from dvpo.policy import Policy, in_chunks
from dvpo.seeding import derive_seed


class QuantileHeads(nn.Module):
    """N independent linear heads of M quantiles: hidden states [..., D] -> [..., N, M], float32.

    `monotone`: non-crossing by construction (`dvpo.core.monotone`). At the start the mean is 0 and the quantiles are
    spread evenly over one unit of reward; a plain head starts at 0 everywhere. With M = 1 both are a scalar head.
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
            return monotone_quantiles(out) if self.monotone else out


class CategoricalHeads(nn.Module):
    """N independent linear heads of a histogram over fixed returns: hidden states [..., D] -> [..., N, M], float32.

    What comes out are M atoms of equal mass with the histogram's own mean, so that whatever reads quantiles reads
    these; the loss reads `logits`. At the start every bin is as likely as any other.

    Args:
        hidden_size: D.
        num_heads: N.
        num_atoms: M.
        centres_R: where the bins stand, in units of the reward, increasing.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_atoms: int, centres_R: Tensor) -> None:
        super().__init__()
        self.num_heads, self.num_atoms = num_heads, num_atoms
        self.linear = nn.Linear(hidden_size, num_heads * len(centres_R), dtype=torch.float32)
        nn.init.normal_(self.linear.weight, std=0.01 / math.sqrt(hidden_size))
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("centres_R", centres_R.float())
        self.centres_R: Tensor

    def forward(self, hidden_D: Tensor) -> Tensor:
        return categorical_atoms(self.logits(hidden_D).softmax(dim=-1), self.centres_R, self.num_atoms)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Unnormalised log-probabilities of the bins: [..., N, R]."""
        with torch.autocast(hidden_D.device.type, enabled=False):
            return self.linear(hidden_D.float()).unflatten(-1, (self.num_heads, -1))


class ImplicitHeads(nn.Module):
    """N independent quantile functions: hidden states [..., D] and levels [M] -> [..., N, M], float32.

        theta_i(s, tau) = sum_d w_id h_d(s) relu( sum_k C_idk cos(pi k tau) + b_id ),   k < 64,   h_0 = 1

    The head is linear in h at every level, as a head of fixed quantiles is, and nothing keeps it from crossing. One
    set of levels serves all states of a call, so the N M rows of weights are made once.

    Args:
        hidden_size: D.
        num_heads: N.
        levels_M: where `forward` reads it if it is not told otherwise.

    Source: Dabney et al. 2018 (arXiv 1806.06923), eq. 4.
    """

    COSINES = 64

    def __init__(self, hidden_size: int, num_heads: int, levels_M: Tensor) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.embedding = nn.Linear(self.COSINES, num_heads * (hidden_size + 1), dtype=torch.float32)
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size + 1, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.01 / math.sqrt(hidden_size))
        self.register_buffer("levels_M", levels_M.float(), persistent=False)
        self.register_buffer("drawn_M", levels_M.float(), persistent=False)
        self.levels_M: Tensor
        self.drawn_M: Tensor

    def forward(self, hidden_D: Tensor, levels_M: Tensor | None = None) -> Tensor:
        levels_M = self.levels_M if levels_M is None else levels_M
        with torch.autocast(hidden_D.device.type, enabled=False):
            waves = math.pi * torch.arange(self.COSINES, device=levels_M.device)
            embedded_MND = F.relu(self.embedding((levels_M.unsqueeze(-1) * waves).cos())).unflatten(
                -1, (self.num_heads, -1)
            )
            weight_NMD = self.weight.unsqueeze(1) * embedded_MND.transpose(0, 1)
            out = F.linear(F.pad(hidden_D.float(), (1, 0), value=1.0), weight_NMD.flatten(0, 1))
            return out.unflatten(-1, (self.num_heads, -1))

    def draw(self, *key: str | int) -> None:
        """Draw the levels of an update, one from each M-th of (0, 1), so that their atoms still weigh the same."""
        generator = torch.Generator().manual_seed(derive_seed("levels", *key))
        num_levels = len(self.levels_M)
        drawn_M = (torch.arange(num_levels) + torch.rand(num_levels, generator=generator)) / num_levels
        self.drawn_M = drawn_M.to(self.levels_M)


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
        self.direction.copy_(policy.logit_scale * (head.weight[good].float() - head.weight[bad].float()))
        if getattr(head, "bias", None) is not None:
            self.offset.copy_(policy.logit_scale * (head.bias[good].float() - head.bias[bad].float()))
