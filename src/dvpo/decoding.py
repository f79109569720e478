"""A policy's next-token logits for a batch of rows, one token a step.

What it spares: a context that several rows share is read once; keys and values stand in buffers with room for all
tokens (transformers' own dynamic cache copies everything it holds at every token); rows without padding need no mask.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dvpo.policy import Policy
from dvpo.prefix import distinct_rows, keeps_keys_and_values, positions


class Decoder:
    """Reads the contexts, then takes one token for each row at a time.

    Args:
        policy: its model must be in evaluation mode.
        tokens_BS: contexts, padded in front.
        attention_BS: bool, False at padding.
        room: tokens that may follow the contexts.

    Attributes:
        logits_BV: float32, of the token that comes next in each row.
    """

    def __init__(self, policy: Policy, tokens_BS: Tensor, attention_BS: Tensor, room: int) -> None:
        self._policy = policy
        config = policy.model.config
        self._attention_BS: Tensor | None = None if bool(attention_BS.all()) else attention_BS
        self._position_B1 = positions(attention_BS)[:, -1:]
        self._cache: Any = None  # a family that remembers anything else makes its own, and shares nothing
        group_B = None
        self.can_select = keeps_keys_and_values(config)
        """Whether rows can be dropped: what a recurrent layer remembers is not known here."""
        if self.can_select:
            self._cache = _roomy_cache(config, tokens_BS.shape[1] + room)
            contexts_GS, known_GS, group_B = distinct_rows(tokens_BS, attention_BS)
            if len(contexts_GS) < len(tokens_BS):
                tokens_BS, attention_BS = contexts_GS, known_GS
            else:
                group_B = None
        mask_BS = None if self._attention_BS is None else attention_BS
        self.logits_BV = self._forward(tokens_BS, mask_BS, positions(attention_BS))
        if group_B is not None:
            self._cache.batch_select_indices(group_B)
            self.logits_BV = self.logits_BV[group_B]

    def step(self, tokens_B: Tensor, advance_B: Tensor) -> None:
        """Append a token to each row; its position goes on only where `advance_B` says so.

        Rows that are finished stand still, or they would run out of the positions that the model knows.
        """
        self._position_B1 = self._position_B1 + advance_B.unsqueeze(-1)
        if self._attention_BS is not None:
            self._attention_BS = torch.cat([self._attention_BS, self._attention_BS.new_ones(len(tokens_B), 1)], dim=1)
        self.logits_BV = self._forward(tokens_B.unsqueeze(-1), self._attention_BS, self._position_B1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows alone, in that order."""
        self._cache.batch_select_indices(rows)
        self._position_B1 = self._position_B1[rows]
        if self._attention_BS is not None:
            self._attention_BS = self._attention_BS[rows]

    def _forward(self, tokens_BS: Tensor, attention_BS: Tensor | None, positions_BS: Tensor) -> Tensor:
        out = self._policy.trunk(
            input_ids=tokens_BS,
            attention_mask=None if attention_BS is None else attention_BS.long(),
            position_ids=positions_BS,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        return self._policy.logits(out.last_hidden_state[:, -1])


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer's keys and values [B, heads, tokens, D], views of buffers that grow by `GROWTH` tokens, up to `room`.

    Under autocast they are kept in its type, to which attention would cast them at every token: a normalised key comes
    in float32.
    """

    GROWTH = 512

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all that there are."""
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(kind), value_states.to(kind)
        held = self.get_seq_length()
        if held == 0:
            self.lazy_initialization(key_states, value_states)
        length = held + key_states.shape[-2]
        if self._buffers is None or length > self._buffers[0].shape[-2]:
            grown = -(-length // self.GROWTH) * self.GROWTH
            self._make_room(key_states, value_states, max(length, min(self.room, grown)))
        assert self._buffers is not None
        keys, values = self._buffers
        keys[:, :, held:length] = key_states
        values[:, :, held:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in that order; a row may be named more than once."""
        super().batch_select_indices(indices)
        self._buffers = None  # what is held are copies now

    def _make_room(self, key_states: Tensor, value_states: Tensor, room: int) -> None:
        held = self.get_seq_length()
        made = []
        for states, old in ((key_states, self.keys), (value_states, self.values)):
            buffer = states.new_empty(*states.shape[:2], room, states.shape[-1])
            if held:
                buffer[:, :, :held] = old
            made.append(buffer)
        self._buffers = made[0], made[1]


def _roomy_cache(config: Any, room: int) -> DynamicCache:
    """transformers' cache for a model, with room for that many tokens in the layers that attend to all of them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
