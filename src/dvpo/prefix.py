"""Hidden states of responses; a prompt that several responses share is computed once.

A group of responses has one prompt. Plain batches compute it once a response, forwards and backwards; here its keys and
values are computed once and read by all of them. The sum of the responses' gradients flows back through the one copy,
so that results and gradients are those of the plain batch up to rounding. Where too little would be spared, rows are
moved to the left, which spares the padding in front and the mask.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dvpo.parallel import is_sharded
from dvpo.recomputing import recomputes

WORTHWHILE = 0.1
"""Share of the batch's columns that must be spared: two short forwards cost more than one in calls."""


def hidden_states(trunk: nn.Module, tokens_BS: Tensor, attention_BS: Tensor, first: int = 0) -> Tensor:
    """Last hidden states of a transformer trunk, after the final norm, from column `first` on: [B, S - first, D].

    Args:
        trunk: a transformer of transformers without its language-model head.
        tokens_BS: texts, padded anywhere.
        attention_BS: bool, False at padding.
        first: the last column of what rows may have in common, their prompts.
    """
    common = first + 1
    tokens_BS, attention_BS = _padding_in_front(tokens_BS, attention_BS, common)
    if 1 < common < tokens_BS.shape[1] and _can_share(trunk):
        prompts_GP, attention_GP, group_B = distinct_rows(tokens_BS[:, :common], attention_BS[:, :common])
        if (len(tokens_BS) - len(prompts_GP)) * common >= WORTHWHILE * tokens_BS.numel():
            return _shared(trunk, tokens_BS, attention_BS, prompts_GP, attention_GP, group_B)
    return _unshared(trunk, tokens_BS, attention_BS, first)


def distinct_rows(tokens_BP: Tensor, attention_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row once: (tokens [G, P], attention [G, P], for every row of the batch where it stands among them [B])."""
    rows_GP, group_B = torch.where(attention_BP, tokens_BP, -1).unique(dim=0, return_inverse=True)
    return rows_GP.clamp(min=0), rows_GP >= 0, group_B


def positions(attention_BS: Tensor) -> Tensor:
    """Positions that count real tokens, so that padding does not matter: [B, S]."""
    return (attention_BS.long().cumsum(dim=-1) - 1).clamp(min=0)


def keeps_keys_and_values(config: Any) -> bool:
    """Whether all that a model of that config remembers of a text are keys and values, of rows that stand alone."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _unshared(trunk: Any, tokens_BS: Tensor, attention_BS: Tensor, first: int) -> Tensor:
    """One forward of rows moved to the left: with padding behind them alone a causal model needs no mask for it, and
    without one attention takes its fastest kernel and holds no [S, S] matrix. States at padding mean nothing."""
    size, place_BS = len(tokens_BS), positions(attention_BS)
    order_BS = (~attention_BS).byte().argsort(dim=1, stable=True)
    still = (order_BS == torch.arange(order_BS.shape[1], device=order_BS.device)).all()
    width, stands = torch.stack([place_BS[:, -1].max() + 1, still]).tolist()
    out = trunk(input_ids=tokens_BS.gather(1, order_BS[:, :width]), use_cache=False).last_hidden_state
    if stands and width == tokens_BS.shape[1]:
        return out[:, first:]
    rows_BU = width * torch.arange(size, device=out.device).unsqueeze(1) + place_BS[:, first:]
    return out.flatten(0, 1).index_select(0, rows_BU.flatten()).unflatten(0, (size, -1))


def _padding_in_front(tokens_BS: Tensor, attention_BS: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same with the padding among the first columns before all of their tokens: a sliding window counts columns."""
    order_BP = attention_BS[:, :columns].byte().argsort(dim=1, stable=True)
    front = [part[:, :columns].gather(1, order_BP) for part in (tokens_BS, attention_BS)]
    return torch.cat([front[0], tokens_BS[:, columns:]], 1), torch.cat([front[1], attention_BS[:, columns:]], 1)


def _can_share(trunk: Any) -> bool:
    if is_sharded(trunk):
        return False  # every process must run as many passes, and what may be shared differs from one to the next
    if trunk.training and recomputes(trunk):
        return False  # transformers keeps no cache then
    return keeps_keys_and_values(trunk.config)


def _shared(
    trunk: Any, tokens_BS: Tensor, attention_BS: Tensor, prompts_GP: Tensor, attention_GP: Tensor, group_B: Tensor
) -> Tensor:
    prompt_length = prompts_GP.shape[1]
    cache = DynamicCache(config=trunk.config)
    prompt = trunk(
        input_ids=prompts_GP,
        attention_mask=attention_GP.long(),
        position_ids=positions(attention_GP),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(group_B)
    response = trunk(
        input_ids=tokens_BS[:, prompt_length:],
        attention_mask=attention_BS.long(),
        position_ids=positions(attention_BS)[:, prompt_length:],
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([prompt.last_hidden_state[group_B, -1:], response.last_hidden_state], dim=1)
