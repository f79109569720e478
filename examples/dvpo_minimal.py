"""DVPO as in the paper, the row `dvpo_paper`, in one file, with torch and transformers and nothing of ours.

A tiny language model adds two numbers. A short supervised warm-up leaves it right in about a quarter of its answers;
then it learns from a reward that is *wrong three times in ten*. The critic predicts a distribution of the return for
every token, and its loss treats the two tails of that distribution unequally.

    python examples/dvpo_minimal.py          # on a CPU

Sections are those of docs/method.md. Letters at the end of a tensor's name are its shape: B sequences,
P positions of the prompt, T of the response, S = P + T, N critic heads, M quantiles, K policy tokens (B and T flattened
where the mask is on). `tests/test_minimal.py` shows that `update` moves the weights as the library does.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from transformers import Qwen3Config, Qwen3ForCausalLM

# What the method is told. The values are those of the library's row `dvpo_paper`, but for M and the learning rates.
GAMMA, LAM = 1.0, 0.95  # discount and weight of long returns, per policy token
HEADS, QUANTILES = 3, 16  # N and M
KAPPA = 0.1  # half-width of the Huber loss's quadratic zone, in units of the reward
ETA = 2.0  # how much more the lower quantiles weigh in the term `risk`
ALPHA, BETA = 0.1, 0.1  # mass of the lower and of the upper tail
TERM_WEIGHT = 0.1  # of each of the seven terms beside quantile regression
CLIP = 0.2  # how far the ratio of PPO may leave 1
EPOCHS = 2  # optimiser steps on each batch of responses
MAX_GRAD_NORM = 1.0
POLICY_LR, CRITIC_LR = 3e-4, 1e-3

# The experiment.
FLIP = 0.3  # probability that the reward of a response is inverted
STEPS, WARMUP_STEPS, MAX_LENGTH = 150, 60, 3  # T = 3: two digits and the end
RESPONSES = 256  # a step, to prompts drawn at random

# The task: "7+8=" -> "15".

SYMBOLS = "_.0123456789+="
PAD, END = SYMBOLS.index("_"), SYMBOLS.index(".")
SUMS = [(a, b) for a in range(10) for b in range(10)]


PROMPTS = torch.tensor([[SYMBOLS.index(symbol) for symbol in f"{a}+{b}="] for a, b in SUMS])
ANSWERS = torch.tensor([[SYMBOLS.index(symbol) for symbol in f"{a + b}.".ljust(MAX_LENGTH, "_")] for a, b in SUMS])


def make_policy() -> Qwen3ForCausalLM:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(SYMBOLS), max_position_embeddings=16, **size, **attention))


# Section 1: states, values, ends
@dataclass
class Batch:
    tokens_BS: Tensor
    attention_BS: Tensor  # True where there is a token of anybody
    mask_BT: Tensor  # True where the policy produced the token, the end token included
    old_logprobs_BT: Tensor  # of those tokens, recorded at sampling
    rewards_BT: Tensor  # on the response's last policy token, 0 elsewhere


def run(model: nn.Module, tokens_BS: Tensor, attention_BS: Tensor) -> Tensor:
    """Logits or hidden states [B, S, ...] of a transformer; positions count tokens, so that padding does not matter."""
    positions_BS = (attention_BS.long().cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=tokens_BS, attention_mask=attention_BS.long(), position_ids=positions_BS, use_cache=False)[0]


def before_response(values_BS: Tensor, mask_BT: Tensor) -> Tensor:
    """What stands at the states s_t = (prompt, y_<t): at the column *before* token t, the prompt's last for t = 0."""
    return values_BS[:, -mask_BT.shape[1] - 1 : -1]


def response_logprobs(policy: nn.Module, tokens_BS: Tensor, attention_BS: Tensor, mask_BT: Tensor) -> Tensor:
    """log pi(y_t | s_t), [B, T], 0 where masked."""
    logprobs_BTV = before_response(run(policy, tokens_BS, attention_BS), mask_BT).log_softmax(dim=-1)
    return logprobs_BTV.gather(-1, tokens_BS[:, -mask_BT.shape[1] :, None])[..., 0] * mask_BT


@torch.no_grad()
def sample(policy: nn.Module, prompts_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One response to each prompt: (tokens_BS, attention_BS, mask_BT)."""
    tokens_BS, attention_BS = prompts_BP, prompts_BP != PAD
    going_B = torch.ones(len(prompts_BP), dtype=torch.bool)
    for _ in range(MAX_LENGTH):
        next_B = torch.multinomial(run(policy, tokens_BS, attention_BS)[:, -1].softmax(dim=-1), 1)[:, 0]
        tokens_BS = torch.cat([tokens_BS, next_B.where(going_B, PAD)[:, None]], dim=1)
        attention_BS = torch.cat([attention_BS, going_B[:, None]], dim=1)
        # Who ended is on this record; the tokens do not say it, since a policy may well produce the pad token.
        going_B = going_B & (next_B != END)
    return tokens_BS, attention_BS, attention_BS[:, prompts_BP.shape[1] :]


@torch.no_grad()
def collect(policy: nn.Module) -> tuple[Batch, float, float]:
    """Responses to random prompts under a noisy reward, with the share of right answers and of observed rewards."""
    rows_B = torch.randint(len(PROMPTS), (RESPONSES,))
    tokens_BS, attention_BS, mask_BT = sample(policy, PROMPTS[rows_B])
    true_B = (tokens_BS[:, -MAX_LENGTH:] == ANSWERS[rows_B]).all(dim=-1)
    observed_B = (true_B ^ (torch.rand(len(true_B)) < FLIP)).float()
    last_BT = F.one_hot(mask_BT.sum(dim=-1) - 1, MAX_LENGTH)
    old_logprobs_BT = response_logprobs(policy, tokens_BS, attention_BS, mask_BT)
    batch = Batch(tokens_BS, attention_BS, mask_BT, old_logprobs_BT, last_BT * observed_B[:, None])
    return batch, float(true_B.float().mean()), float(observed_B.mean())


# Section 2: the critic
class Critic(nn.Module):
    """A trunk that starts as a copy of the policy's, and N linear heads of M quantiles that cannot cross.

        theta_j = base + (c_j - mean_j c_j) / M,   c_j = sum_{k <= j} softplus(x_k)

    At the start every head's mean is 0 and its quantiles are spread evenly over one unit of reward.
    """

    def __init__(self, trunk: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        self.heads = nn.Linear(hidden_size, HEADS * (1 + QUANTILES))
        nn.init.normal_(self.heads.weight, std=0.01 / math.sqrt(hidden_size))  # not 0: the heads are to differ
        nn.init.constant_(self.heads.bias, math.log(math.e - 1))  # softplus = 1
        with torch.no_grad():
            self.heads.bias.view(HEADS, -1)[:, 0] = 0.0

    def forward(self, tokens_BS: Tensor, attention_BS: Tensor) -> Tensor:
        """theta_ij at every column: [B, S, N, M]."""
        out = self.heads(run(self.trunk, tokens_BS, attention_BS)).unflatten(-1, (HEADS, -1))
        c_BSNM = F.softplus(out[..., 1:]).cumsum(dim=-1) / QUANTILES
        return out[..., :1] + c_BSNM - c_BSNM.mean(dim=-1, keepdim=True)


# Section 3: advantages and targets
def distributional_gae(rewards_BT: Tensor, theta_BTM: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation for each quantile index by itself: (advantages, targets), both [B, T, M].

        delta_tj = r_t + gamma theta_j(s_{t+1}) - theta_j(s_t)
        A_tj     = delta_tj + gamma lam A_{t+1,j}
        G_tj     = theta_j(s_t) + A_tj

    The value after the last token is 0. Masked positions are skipped: the state after a policy token is that of the
    *next policy token*, so both running values are carried over what lies between.
    """
    advantages_BTM, targets_BTM = torch.zeros_like(theta_BTM), torch.zeros_like(theta_BTM)
    next_theta_BM = advantage_BM = torch.zeros_like(theta_BTM[:, 0])
    for t in reversed(range(mask_BT.shape[1])):
        on_B1, theta_BM = mask_BT[:, t, None], theta_BTM[:, t]
        delta_BM = rewards_BT[:, t, None] + GAMMA * next_theta_BM - theta_BM
        advantage_BM = torch.where(on_B1, delta_BM + GAMMA * LAM * advantage_BM, advantage_BM)
        next_theta_BM = torch.where(on_B1, theta_BM, next_theta_BM)
        advantages_BTM[:, t] = torch.where(on_B1, advantage_BM, 0.0)
        targets_BTM[:, t] = torch.where(on_B1, theta_BM + advantage_BM, 0.0)
    return advantages_BTM, targets_BTM


def whiten(advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the policy tokens of the batch, 0 where masked."""
    on_K = advantages_BT[mask_BT]
    whitened_BT = (advantages_BT - on_K.mean()) / (on_K.std(correction=0) + 1e-8)
    return torch.where(mask_BT, whitened_BT, 0.0)


@torch.no_grad()
def estimate(critic: Critic, batch: Batch) -> tuple[Tensor, Tensor]:
    """Once a batch and before any update: (advantages [B, T], target atoms [B, T, M])."""
    theta_BTNM = before_response(critic(batch.tokens_BS, batch.attention_BS), batch.mask_BT)
    theta_BTM = theta_BTNM.mean(dim=-2).sort(dim=-1).values  # the ensemble
    advantages_BTM, targets_BTM = distributional_gae(batch.rewards_BT, theta_BTM, batch.mask_BT)
    return whiten(advantages_BTM.mean(dim=-1), batch.mask_BT), targets_BTM


# Section 4: the critic's loss
def critic_terms(theta_KNM: Tensor, targets_KM: Tensor) -> dict[str, Tensor]:
    """The eight terms of each token, [K]; the loss is the first plus TERM_WEIGHT times each of the others.

    theta_ij is head i's prediction, theta_j the ensemble sorted along j, G_k the sorted target atoms; low and up are
    the lowest ceil(alpha n) and the highest ceil(beta n) of n atoms.
    """
    num_heads, num_quantiles = theta_KNM.shape[1:]
    tau_M1 = (torch.arange(num_quantiles)[:, None] + 0.5) / num_quantiles  # tau_j = (j - 1/2) / M
    atoms_KM = targets_KM.sort(dim=-1).values

    # rho_tau(u) = |tau - 1{u<0}| H(u) of every pair u = G_k - theta_ij. The library gets the same numbers without
    # this tensor of N M M numbers a token.
    u_KNMM = atoms_KM[:, None, None, :] - theta_KNM[..., None]
    huber_KNMM = torch.where(u_KNMM.abs() <= KAPPA, u_KNMM**2 / (2 * KAPPA), u_KNMM.abs() - KAPPA / 2)
    rho_KM = ((tau_M1 - (u_KNMM < 0).float()).abs() * huber_KNMM).mean(dim=(1, 3))
    risk_weights_M = torch.softmax(-ETA * tau_M1[:, 0], dim=0) * num_quantiles  # exp(-eta tau_j) / mean_j of it

    theta_KM = theta_KNM.mean(dim=1).sort(dim=-1).values
    low, up = tail_low(theta_KM), tail_up(theta_KM)
    low_G, up_G = tail_low(atoms_KM), tail_up(atoms_KM)
    bends_down = (-theta_KM.diff(n=2, dim=-1)).relu()  # -D_j, D_j = theta_{j+1} - 2 theta_j + theta_{j-1}
    pairs = [(i, k) for i in range(num_heads) for k in range(i)]
    return {
        "qr": rho_KM.mean(dim=-1),
        "risk": (risk_weights_M * rho_KM).mean(dim=-1),
        "cvar": (low.mean(dim=-1) - low_G.mean(dim=-1)) ** 2,
        "gain": (up.mean(dim=-1) - up_G.mean(dim=-1)) ** 2,
        "shift": (atoms_KM.mean(dim=-1) - theta_KM.mean(dim=-1)).relu(),
        "shape": (low.var(-1, correction=0) - low_G.var(-1, correction=0)).relu()
        + (up_G.var(-1, correction=0) - up.var(-1, correction=0)).relu(),
        "curvature": tail_low(bends_down).mean(dim=-1) + tail_up(bends_down).mean(dim=-1),
        "consistency": torch.stack([(theta_KNM[:, i] - theta_KNM[:, k]) ** 2 for i, k in pairs]).mean(dim=(0, 2)),
    }


def tail_low(atoms_KM: Tensor) -> Tensor:
    return atoms_KM[:, : math.ceil(ALPHA * atoms_KM.shape[1] - 1e-9)]


def tail_up(atoms_KM: Tensor) -> Tensor:
    return atoms_KM[:, -math.ceil(BETA * atoms_KM.shape[1] - 1e-9) :]


def critic_loss(critic: Critic, batch: Batch, targets_BTM: Tensor) -> Tensor:
    """L = qr + sum_x weight_x x, mean over policy tokens."""
    theta_BTNM = before_response(critic(batch.tokens_BS, batch.attention_BS), batch.mask_BT)
    terms = critic_terms(theta_BTNM[batch.mask_BT], targets_BTM[batch.mask_BT])
    return (terms.pop("qr") + TERM_WEIGHT * sum(terms.values())).mean()


# Section 5: the actor's loss
def clipped_surrogate(logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor) -> Tensor:
    """-min( ratio A, clip(ratio, 1 - clip, 1 + clip) A ),   ratio = exp(logp - logp_old)."""
    ratio_K = (logprobs_K - old_logprobs_K).exp()
    return -torch.minimum(ratio_K * advantages_K, ratio_K.clamp(1 - CLIP, 1 + CLIP) * advantages_K)


def policy_loss(policy: nn.Module, batch: Batch, advantages_BT: Tensor) -> Tensor:
    """Mean over policy tokens."""
    on = batch.mask_BT
    logprobs_BT = response_logprobs(policy, batch.tokens_BS, batch.attention_BS, on)
    return clipped_surrogate(logprobs_BT[on], batch.old_logprobs_BT[on], advantages_BT[on]).mean()


# The update: two modules, two optimisers, two clip norms, so that neither gradient shrinks the other.
def descend(loss: Tensor, module: nn.Module, optimiser: Optimizer) -> float:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
    optimiser.step()
    return float(loss.detach())


def update(
    policy: nn.Module, critic: Critic, policy_optimiser: Optimizer, critic_optimiser: Optimizer, batch: Batch
) -> dict[str, float]:
    """Estimate once, then some epochs of gradient steps; the losses of the last one."""
    advantages_BT, targets_BTM = estimate(critic, batch)
    for _ in range(EPOCHS):
        losses = {
            "critic_loss": descend(critic_loss(critic, batch, targets_BTM), critic, critic_optimiser),
            "policy_loss": descend(policy_loss(policy, batch, advantages_BT), policy, policy_optimiser),
        }
    return losses


# The run
def warm_up(policy: nn.Module) -> None:
    """A little supervised learning, since who is never right is never rewarded."""
    optimiser = AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    tokens_BS, mask_BT = torch.cat([PROMPTS, ANSWERS], dim=1), ANSWERS != PAD
    for _ in range(WARMUP_STEPS):
        descend(-response_logprobs(policy, tokens_BS, tokens_BS != PAD, mask_BT)[mask_BT].mean(), policy, optimiser)


def accuracy(policy: nn.Module, samples: int = 8) -> float:
    """True share of right answers, every prompt sampled as in training."""
    rows_B = torch.arange(len(PROMPTS)).repeat(samples)
    tokens_BS, _, _ = sample(policy, PROMPTS[rows_B])
    return float((tokens_BS[:, -MAX_LENGTH:] == ANSWERS[rows_B]).all(dim=-1).float().mean())


def main() -> tuple[float, float]:
    """Returns the true accuracy before and after."""
    torch.manual_seed(0)
    policy = make_policy()
    warm_up(policy)
    critic = Critic(policy.model, policy.config.hidden_size)
    policy_optimiser = AdamW(policy.parameters(), lr=POLICY_LR, weight_decay=0.0)
    critic_optimiser = AdamW(critic.parameters(), lr=CRITIC_LR, weight_decay=0.0)
    before = accuracy(policy)
    for step in range(1, STEPS + 1):
        batch, true, observed = collect(policy)
        losses = update(policy, critic, policy_optimiser, critic_optimiser, batch)
        figures = {"true": true, "observed": observed, **losses}
        if step == 1 or step % 15 == 0:
            print(f"step {step:3}  " + "  ".join(f"{name} {value:6.3f}" for name, value in figures.items()), flush=True)
    after = accuracy(policy)
    print(f"true accuracy {before:.3f} -> {after:.3f}, learnt from rewards of which {FLIP:.0%} were wrong")
    return before, after


if __name__ == "__main__":
    main()
