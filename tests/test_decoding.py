"""The decoder spares work and changes no draw: shared contexts, buffers with room, rows that are dropped."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dvpo.decoding import Decoder, RoomyLayer
from dvpo.errors import InputError
from dvpo.policy import Policy, check_head
from dvpo.sampling import HuggingFaceSampler, pad_left
from dvpo.settings import SamplingConfig
from tiny_models import FAMILIES, tiny_policy

CONTEXTS = [[70, 81, 92], [17] * 5, [70, 81, 92], [40], [17] * 5]


@torch.no_grad()
def plain_logits(policy: Policy, rows: list[list[int]]) -> Tensor:
    """Each row by itself, without a cache."""
    return torch.stack(
        [policy.logits(policy.trunk(input_ids=torch.tensor([r])).last_hidden_state[0, -1]) for r in rows]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("contexts", [CONTEXTS, [c for c in CONTEXTS if len(c) == 3], [[9, 8], [7, 6], [5, 4]]])
@torch.no_grad()
def test_every_steps_logits_are_those_of_a_forward_of_each_row_by_itself(family: str, contexts: list[list[int]]):
    """Ragged and shared; of one length and shared, which needs no mask; distinct, in an order that is not sorted."""
    policy, rows = tiny_policy(family), [list(context) for context in contexts]
    decoder = Decoder(policy, *pad_left(contexts, policy.pad_id), room=4)
    for t in range(4):
        torch.testing.assert_close(decoder.logits_BV, plain_logits(policy, rows), rtol=1e-4, atol=1e-5)
        if t == 1:  # the last rows go on, in another order
            keep = [len(rows) - 1, 1]
            decoder.select(torch.tensor(keep))
            rows = [rows[i] for i in keep]
        tokens = [30 + t + i for i in range(len(rows))]
        decoder.step(torch.tensor(tokens), torch.ones(len(rows), dtype=torch.bool))
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]


@torch.no_grad()
def test_a_model_that_remembers_more_than_keys_and_values_is_sampled_from_without_dropping_rows():
    """Convolutions beside attention (LFM2): a quarter of the rows ends at once, and nothing is dropped or shared."""
    policy = tiny_policy("lfm2")
    check_head(policy)
    decoder = Decoder(policy, *pad_left(CONTEXTS, policy.pad_id), room=4)
    assert not decoder.can_select
    budgets = [1, 1, 5, 5, 5]
    turns = HuggingFaceSampler(policy, SamplingConfig()).sample(CONTEXTS, budgets, range(5))
    for context, budget, turn in zip(CONTEXTS, budgets, turns, strict=True):
        assert len(turn.tokens) == budget or turn.finished
        read = policy.trunk(input_ids=torch.tensor([[*context, *turn.tokens]])).last_hidden_state[0]
        logprobs = policy.logits(read[len(context) - 1 : -1]).log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(turn.tokens).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_returns_no_cache_is_refused():
    policy = tiny_policy()
    forward = policy.trunk.forward
    policy.trunk.forward = lambda **given: SimpleNamespace() if given["use_cache"] else forward(**given)
    with pytest.raises(InputError, match="does not hand on what it has read"):
        check_head(policy)


def test_a_context_that_rows_share_is_read_once():
    policy, read = tiny_policy(), []
    policy.trunk.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampler = HuggingFaceSampler(policy, SamplingConfig())
    sampler.sample([[2, 5, 3]] * 6 + [[9, 9]] * 2, [2] * 8, list(range(8)))
    assert read[0] == 2


def test_contexts_of_one_length_share_a_batch_and_turns_come_back_in_their_order():
    policy, masks = tiny_policy(), []
    policy.trunk.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    contexts = [[70] * 9, [2, 5], [71] * 9, [3, 6]]
    settings = SamplingConfig(batch_size=2)
    turns = HuggingFaceSampler(policy, settings).sample(contexts, [4] * 4, range(4))
    assert masks == [None] * len(masks)  # nothing is padded
    alone = [HuggingFaceSampler(policy, settings).sample([c], [4], [i])[0] for i, c in enumerate(contexts)]
    assert [turn.tokens for turn in turns] == [turn.tokens for turn in alone]


def test_keys_and_values_stand_where_they_were_put_until_there_is_no_room():
    layer, draw = RoomyLayer(room=5), torch.Generator().manual_seed(0)
    states = [torch.randn(3, 2, n, 4, generator=draw) for n in (2, 1, 2, 3)]
    places = []
    for i, new in enumerate(states):
        keys, values = layer.update(new, -new)
        assert torch.equal(keys, torch.cat(states[: i + 1], dim=-2))
        assert torch.equal(values, -keys)
        places.append(keys.data_ptr())
    assert places[0] == places[1] == places[2]  # 2, 3 and 5 tokens fit
    assert places[3] != places[2]  # the eighth does not
    layer.batch_select_indices(torch.tensor([2, 0, 2]))
    expected = torch.cat(states, dim=-2)[[2, 0, 2]]
    more = torch.randn(3, 2, 1, 4, generator=draw)
    assert torch.equal(layer.update(more, more)[0], torch.cat([expected, more], dim=-2))


def test_buffers_grow_by_steps_and_no_further_than_there_is_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RoomyLayer, "GROWTH", 4)
    layer, sizes = RoomyLayer(room=10), []
    for _ in range(5):
        states = torch.randn(1, 1, 2, 4)
        layer.update(states, states)
        sizes.append(layer._buffers[0].shape[-2])
    assert sizes == [4, 4, 8, 8, 10]


def test_under_autocast_keys_and_values_are_kept_in_its_type():
    layer, states = RoomyLayer(room=4), torch.tensor([[[[0.1, 0.2]]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys, values = layer.update(states, states)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys, states.bfloat16())


@pytest.mark.parametrize(("dtype", "inference"), [(torch.float32, True), (torch.bfloat16, False)])
def test_autocast_keeps_its_weights_while_it_samples_which_it_does_not_in_inference_mode(
    dtype: torch.dtype, inference: bool
):
    policy, modes = replace(tiny_policy(), dtype=dtype), []
    policy.trunk.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    HuggingFaceSampler(policy, SamplingConfig()).sample([[2, 5]], [3], [0])
    assert set(modes) == {(inference, False)}


def test_a_layer_that_forgets_what_lies_behind_its_window_stays_transformers_own():
    policy = tiny_policy("gemma2")
    decoder = Decoder(policy, *pad_left(CONTEXTS, policy.pad_id), room=4)
    expected = [type(layer).is_sliding for layer in DynamicCache(config=policy.model.config).layers]
    assert [not isinstance(layer, RoomyLayer) for layer in decoder._cache.layers] == expected
    assert any(expected)
