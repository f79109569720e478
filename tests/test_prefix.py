"""A prompt that rows share is computed once, and padding needs no mask: the same states and gradients, less work."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dvpo import prefix
from dvpo.policy import Policy
from dvpo.prefix import distinct_rows, hidden_states
from dvpo.recomputing import recompute
from tiny_models import FAMILIES, tiny_policy

PROMPTS = [[70, 81, 92, 14, 15], [17, 18, 19], [40, 41, 42, 43]]
ORDER = [2, 0, 1, 0, 2, 0, 1, 1]  # as a shuffled minibatch has them
WIDTH = 5


def batch() -> tuple[Tensor, Tensor]:
    """Prompts padded in front, responses of 3 to 6 tokens padded behind."""
    draw = torch.Generator().manual_seed(0)
    tokens_BS = torch.full((len(ORDER), WIDTH + 6), 250)
    attention_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    for i, which in enumerate(ORDER):
        prompt, length = PROMPTS[which], 3 + i % 4
        text = [*prompt, *torch.randint(8, 200, (length,), generator=draw).tolist()]
        columns = slice(WIDTH - len(prompt), WIDTH + length)
        tokens_BS[i, columns], attention_BS[i, columns] = torch.tensor(text), True
    return tokens_BS, attention_BS


def states_and_gradients(policy: Policy) -> tuple[Tensor, list[Tensor]]:
    """The states at real columns, from the last of the prompt on, and what a weighted sum of them sends back."""
    tokens_BS, attention_BS = batch()
    states_BUD = hidden_states(policy.trunk, tokens_BS, attention_BS, WIDTH - 1)
    states_KD = states_BUD[attention_BS[:, WIDTH - 1 :]]
    weights_KD = torch.randn(states_KD.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(policy.trunk.parameters())
    grads = torch.autograd.grad((weights_KD * states_KD).sum(), parameters, allow_unused=True)
    return states_KD.detach(), [g for g in grads if g is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_the_plain_batch(family: str, monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy(family)
    columns = []
    policy.trunk.register_forward_pre_hook(
        lambda _module, _args, kwargs: columns.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared_KD, shared_grads = states_and_gradients(policy)
    monkeypatch.setattr(prefix, "WORTHWHILE", 2.0)  # more than the whole batch: never
    plain_KD, plain_grads = states_and_gradients(policy)
    # 3 prompts of 5 columns and 8 responses of 6, instead of 8 rows of 11.
    assert columns == [15, 48, 88]
    torch.testing.assert_close(shared_KD, plain_KD, rtol=1e-4, atol=1e-5)
    for shared, plain in zip(shared_grads, plain_grads, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_a_prompt_that_differs_in_its_padding_alone_is_another_prompt():
    tokens_BP = torch.tensor([[0, 7], [0, 7], [0, 7]])
    attention_BP = torch.tensor([[True, True], [False, True], [True, True]])
    rows_GP, attention_GP, group_B = distinct_rows(tokens_BP, attention_BP)
    assert len(rows_GP) == 2
    assert torch.equal(rows_GP[group_B] * attention_BP, tokens_BP * attention_BP)
    assert torch.equal(attention_GP[group_B], attention_BP)


@pytest.mark.parametrize("case", ["distinct", "checkpointing", "no response"])
def test_one_plain_forward_where_nothing_can_be_shared(case: str):
    policy = tiny_policy()
    tokens_BS, attention_BS = batch()
    calls = []
    policy.trunk.register_forward_pre_hook(lambda *_: calls.append(1))
    if case == "distinct":
        tokens_BS[:, WIDTH - 1] = torch.arange(100, 100 + len(ORDER))
    elif case == "checkpointing":
        recompute(policy.model)
        policy.model.train()
    else:
        tokens_BS, attention_BS = tokens_BS[:, :WIDTH], attention_BS[:, :WIDTH]
    states_BUD = hidden_states(policy.trunk, tokens_BS, attention_BS, WIDTH - 1)
    assert len(calls) == 1
    assert states_BUD.shape[1] == tokens_BS.shape[1] - WIDTH + 1


def test_rows_that_share_nothing_meet_attention_without_a_mask_whatever_their_padding(monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy()
    tokens_BS, attention_BS = batch()
    tokens_BS = torch.cat([tokens_BS, tokens_BS[:, :2]], dim=1)  # padding of the whole batch, before and behind
    attention_BS = torch.cat([attention_BS, torch.zeros_like(attention_BS[:, :2])], dim=1)
    masks, widths, plain = [], [], functional.scaled_dot_product_attention

    def attention(
        query: Tensor, *given: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **named: Any
    ):
        masks.append(attn_mask)
        widths.append(query.shape[-2])
        assert is_causal
        return plain(query, *given, attn_mask=attn_mask, is_causal=is_causal, **named)

    monkeypatch.setattr(prefix, "WORTHWHILE", 2.0)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    states_BSD = hidden_states(policy.trunk, tokens_BS, attention_BS)
    assert set(masks) == {None}
    assert set(widths) == {11}  # the longest row: 5 of prompt and 6 of response, of 13 columns
    monkeypatch.undo()
    for row, real in zip(range(len(tokens_BS)), attention_BS, strict=True):
        alone_1SD = policy.trunk(input_ids=tokens_BS[row : row + 1, real], use_cache=False).last_hidden_state
        torch.testing.assert_close(states_BSD[row, real], alone_1SD[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shares", [True, False])
def test_a_gap_within_a_prompt_is_none_to_a_sliding_window(monkeypatch: pytest.MonkeyPatch, shares: bool):
    policy = tiny_policy("gemma2")  # a window of 8
    draw = torch.Generator().manual_seed(2)
    hint, gap, prompt, response = 5, 6, 3, 4
    row = torch.randint(8, 200, (hint + prompt + response,), generator=draw)
    tokens_BS = torch.cat([row[:hint], torch.zeros(gap, dtype=torch.long), row[hint:]]).repeat(4, 1)
    attention_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    attention_BS[:, hint : hint + gap] = False
    monkeypatch.setattr(prefix, "WORTHWHILE", 0.0 if shares else 2.0)
    states_BUD = hidden_states(policy.trunk, tokens_BS, attention_BS, hint + gap + prompt - 1)
    alone_1SD = policy.trunk(input_ids=row[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(states_BUD[2], alone_1SD[0, hint + prompt - 1 :], rtol=1e-4, atol=1e-5)
