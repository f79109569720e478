"""What the critic thought at each token of a response: the record that a run keeps and that the views show.

One row of `tokens.jsonl` is one response. Lists with one entry a token hold null where the policy did not write it:

    completion                  the policy's own words, as in `completions.jsonl`: without end tokens
    tokens                      texts of the response's tokens; "" where a character needs the next token as well
    turns                       the policy's turn, -1 for tokens of the environment
    advantages                  the actor's weight, as the update used it; 0 where the response left the step
    value, width, lower, upper  of the ensemble (mean over heads, sorted) at the state before the token: its mean,
                                theta at index round(.9 (M-1)) less that at round(.1 (M-1)), and the means of the lower
                                alpha and the upper beta of its mass; the last three null for M = 1
    quantiles                   all heads, [N][M]
    levels                      of the quantiles, M numbers; at most 32 of them are kept
    alpha, beta                 mass of the tails
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dvpo.batch import Estimates, Rollout
from dvpo.config import Config
from dvpo.core.quantiles import quantile_levels
from dvpo.core.risk import cvar, upper_mean
from dvpo.encoding import ChatEncoder
from dvpo.sampling import Episode
from dvpo.settings_learning import CriticConfig

KEPT_LEVELS = 32
"""Of more quantiles, evenly spaced ones are kept: a picture shows no more, and a record stays small."""
DIGITS = 4
LONGEST_CHARACTER = 4
"""Bytes of UTF-8, hence the most tokens that one character can need."""


def is_shown(step: int, steps: int) -> bool:
    """Whether a step's tokens are kept: steps 1, 2, 4, 8, ... and the last, so that a long run costs little more."""
    return step == steps or step & (step - 1) == 0


def token_rows(
    step: int,
    episodes: Sequence[Episode],
    rollout: Rollout,
    estimates: Estimates,
    encoder: ChatEncoder,
    config: Config,
) -> list[dict[str, Any]]:
    """The records of a step's first `log.tokens` responses; none in a step whose tokens are not kept.

    Args:
        step: the step.
        episodes: its responses, in the rollout's order.
        rollout: the same, scored.
        estimates: what the step made of them, before its update.
        encoder: gives the tokens' texts.
        config: the run's.
    """
    count = config.log.tokens if is_shown(step, config.steps) else 0
    return [
        token_row(index, episode, rollout, estimates, encoder, config.critic)
        for index, episode in enumerate(episodes[:count])
    ]


def token_row(
    index: int, episode: Episode, rollout: Rollout, estimates: Estimates, encoder: ChatEncoder, critic: CriticConfig
) -> dict[str, Any]:
    """The record of one response, which is that row of the rollout."""
    length = len(episode.tokens)
    mask_T = rollout.mask_BT[index, :length]
    return {
        "prompt_id": episode.example.id,
        "visit": episode.visit,
        "sample": episode.sample,
        "prompt": episode.example.prompt,
        "completion": episode.text,
        "observed": _known(rollout.observed_B[index]),
        "true": _known(rollout.true_B[index]),
        "tokens": token_texts(encoder, episode.tokens, episode.turns),
        "turns": list(episode.turns),
        "advantages": _listed(estimates.advantages_BT[index, :length], mask_T),
        **critic_columns(estimates.values_BTNM[index, :length], mask_T, critic),
    }


def critic_columns(values_TNM: Tensor, mask_T: Tensor, critic: CriticConfig) -> dict[str, Any]:
    """The columns of a record that come from the critic; none where there is no critic (N = 0).

    Args:
        values_TNM: predictions at the states before the response's tokens.
        mask_T: True where the policy wrote the token.
        critic: tails and levels.
    """
    if not values_TNM.numel():
        return {}
    theta_TM = values_TNM.mean(dim=-2).sort(dim=-1).values
    size = theta_TM.shape[-1]
    columns: dict[str, Any] = {"value": _listed(theta_TM.mean(dim=-1), mask_T)}
    if size > 1:
        low, high = (round(share * (size - 1)) for share in (0.1, 0.9))
        columns["width"] = _listed(theta_TM[:, high] - theta_TM[:, low], mask_T)
        columns["lower"] = _listed(cvar(theta_TM, critic.alpha), mask_T)
        columns["upper"] = _listed(upper_mean(theta_TM, critic.beta), mask_T)
    kept = torch.linspace(0, size - 1, min(size, KEPT_LEVELS)).round().long().tolist()
    levels = quantile_levels(size, critic.levels).tolist() if size > 1 else [0.5]
    return columns | {
        "quantiles": _listed(values_TNM[..., kept], mask_T),
        "levels": [_short(levels[index]) for index in kept],
        "alpha": critic.alpha,
        "beta": critic.beta,
    }


def token_texts(encoder: ChatEncoder, tokens: Sequence[int], turns: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens included; together they are the text of all.

    A token that ends amid a character adds nothing, the one that completes it (in the same turn) the whole of it.
    """
    texts: list[str] = []
    before = start = 0  # a token is decoded behind its predecessor, for some tokenizers drop a space at the beginning
    for end in range(1, len(tokens) + 1):
        known = _decoded(encoder, tokens[before:start])
        text = _decoded(encoder, tokens[before:end])
        same_turn = end < len(tokens) and turns[end] == turns[end - 1]
        if text.endswith("\ufffd") and same_turn and end - start < LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text[len(known) :])
        before, start = start, end
    return texts


def _decoded(encoder: ChatEncoder, tokens: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) if tokens else ""


def _known(reward: Tensor) -> float | None:
    return float(reward) if reward.isfinite() else None


def _listed(values_T: Tensor, mask_T: Tensor) -> list[Any]:
    """Rounded numbers, nested as the tensor is; None where the policy wrote nothing."""
    numbers = _rounded(values_T.tolist())
    return [number if kept else None for number, kept in zip(numbers, mask_T.tolist(), strict=True)]


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else _short(value)


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
