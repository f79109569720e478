"""Discounted sums over time without a loop over time, and the policy tokens of a batch set side by side for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 16


def discounted_scan_(terms_BSM: Tensor, end_BM: Tensor, decay: float) -> Tensor:
    """Turn terms into discounted sums of the terms still to come, in place.

        x_t = d_t + decay x_{t+1},    x_S = end

    All blocks of 16 positions are summed at once; what stands at their first positions is then the same scan over the
    blocks, with decay^16; and from there every block is filled in, all at once again. S positions take some
    32 log_16 S steps. Powers are multiplied with, never divided by: one that underflows is a 0 that belongs there.

    Args:
        terms_BSM: d, overwritten by x.
        end_BM: x_S.
        decay: in [0, 1].

    Returns:
        `terms_BSM`.
    """
    length = terms_BSM.shape[1]
    head = length % _BLOCK if length > _BLOCK else length
    if head < length:
        blocks_BCPM = terms_BSM[:, head:].unflatten(1, (-1, _BLOCK))
        sums_BCM = blocks_BCPM[:, :, -1].clone()
        for position in reversed(range(_BLOCK - 1)):
            torch.add(blocks_BCPM[:, :, position], sums_BCM, alpha=decay, out=sums_BCM)
        firsts_BCM = discounted_scan_(sums_BCM, end_BM, decay**_BLOCK)
        after_BCM = torch.cat([firsts_BCM[:, 1:], end_BM[:, None]], dim=1)
        for position in reversed(range(_BLOCK)):
            after_BCM = blocks_BCPM[:, :, position].add_(after_BCM, alpha=decay)
        end_BM = terms_BSM[:, head]
    for position in reversed(range(head)):
        end_BM = terms_BSM[:, position].add_(end_BM, alpha=decay)
    return terms_BSM


@dataclass(frozen=True)
class PolicyRows:
    """Where the policy tokens of a batch go when each sequence's are packed against its end.

    A packed sequence has S + 1 rows: the policy tokens, the last in row S - 1, then the end in row S. Of a sequence
    whose last token counts as its end, that token stands in row S. Rows before the first policy token hold anything.
    """

    source_BR: Tensor
    """Row r of a packed sequence, R = S + 1, comes from this position."""
    row_BT: Tensor
    """Position t goes to this row; R at masked positions."""
    is_end_B: Tensor
    """Whether row S holds a policy token."""

    @classmethod
    def of(cls, keep_BT: Tensor, last_is_end: Tensor | None = None) -> "PolicyRows":
        """From the mask and, [B], whose last policy token counts as the end."""
        later_BT = keep_BT.flip(1).cumsum(dim=1).flip(1) - keep_BT.long()  # policy tokens after t
        is_end_B = keep_BT.any(dim=1) & (False if last_is_end is None else last_is_end.bool())
        num_rows = int(keep_BT.sum(dim=1).max()) + 1
        row_BT = torch.where(keep_BT, num_rows - 2 + is_end_B.long()[:, None] - later_BT, num_rows)
        position_BT = torch.arange(keep_BT.shape[1], device=keep_BT.device).expand_as(row_BT)
        source_BR = row_BT.new_zeros(len(row_BT), num_rows + 1).scatter_(1, row_BT, position_BT)[:, :num_rows]
        return cls(source_BR, row_BT, is_end_B)


def take_rows(values_BTM: Tensor, index_BR: Tensor, out: Tensor) -> None:
    """Copy whole rows, out[b, r] = values[b, index[b, r]]; `out` is contiguous."""
    num_sequences, length, num_quantiles = values_BTM.shape
    first_B1 = torch.arange(num_sequences, device=index_BR.device)[:, None] * length
    rows = values_BTM.reshape(-1, num_quantiles)
    torch.index_select(rows, 0, (index_BR + first_B1).flatten(), out=out.view(-1, num_quantiles))
