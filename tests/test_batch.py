"""The rollout: selecting rows and cutting columns keep every field's meaning."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dvpo.batch import Rollout, cut
from dvpo.policy import Policy
from dvpo.sampling import Episode, collate
from dvpo.tasks import Example
from tiny_models import END_ID, tiny_policy

LENGTHS = [(2, 3), (6, 1), (3, 7), (1, 2)]  # tokens of prompt and response


def make_rollout() -> Rollout:
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for i, (prompt, response) in enumerate(LENGTHS):
        tokens = torch.randint(8, 264, (prompt + response,), generator=generator).tolist()
        turns = [0] * response if response < 5 else [0, 0, -1, -1, *[1] * (response - 4)]
        logprobs = [-0.5 - j if turn >= 0 else 0.0 for j, turn in enumerate(turns)]
        made = Episode(Example(f"p{i}", "x"), i, 10 + i, tokens[:prompt], tokens[prompt:], turns, logprobs)
        episodes.append(made)
    scores = {
        "rewards_BT": torch.arange(28.0).reshape(4, 7),
        "rewarded_B": torch.tensor([True, False, True, True]),
        "observed_B": torch.arange(4.0),
        "true_B": torch.arange(4.0) + 10,
    }
    return collate(episodes, scores, END_ID, policy_version=5)


@torch.no_grad()
def policy_logprobs(policy: Policy, rollout: Rollout) -> list[Tensor]:
    """Log-probs of each row's policy tokens."""
    hidden_BSD = policy.hidden_states(rollout.tokens_BS, rollout.attention_BS)
    states_BTD = hidden_BSD[:, rollout.prompt_length - 1 : -1]
    return [
        policy.token_logprobs(states_TD[mask_T], tokens_T[mask_T])[0]
        for states_TD, mask_T, tokens_T in zip(states_BTD, rollout.mask_BT, rollout.response_BT, strict=True)
    ]


@pytest.mark.parametrize("rows", [[0], [1], [3, 0], [2], [0, 1, 2, 3]])
def test_selected_and_trimmed_rows_have_the_logprobs_that_they_had_in_the_batch(rows):
    rollout, policy = make_rollout(), tiny_policy("gpt2")
    micro, expected = rollout.select(torch.tensor(rows)).trimmed(), policy_logprobs(policy, rollout)
    for row, logprobs_K in zip(rows, policy_logprobs(policy, micro), strict=True):
        torch.testing.assert_close(logprobs_K, expected[row], rtol=1e-5, atol=1e-5)
    assert micro.prompt_length == max(LENGTHS[row][0] for row in rows)
    assert micro.mask_BT.shape[1] == max(LENGTHS[row][1] for row in rows)


def test_selecting_takes_every_field_in_the_order_asked_for():
    rollout = make_rollout()
    chosen = rollout.select(torch.tensor([2, 0]))
    assert (chosen.prompt_ids, chosen.visits, chosen.samples) == (("p2", "p0"), (2, 0), (12, 10))
    for name in (f.name for f in fields(rollout) if f.name.endswith(("_BS", "_BT", "_B"))):
        assert torch.equal(getattr(chosen, name)[1], getattr(rollout, name)[0])
        assert torch.equal(getattr(chosen, name)[0], getattr(rollout, name)[2])
    assert len(chosen) == 2
    assert chosen.policy_version == 5


def test_trimming_cuts_all_fields_of_the_response_alike_and_only_padding():
    rollout = make_rollout().select(torch.tensor([3, 0]))
    micro = rollout.trimmed()
    assert micro.attention_BS.any(0).all()
    for name in (f.name for f in fields(rollout) if f.name.endswith("_BT")):
        assert torch.equal(getattr(micro, name), getattr(rollout, name)[:, :3])
    assert torch.equal(micro.tokens_BS, rollout.tokens_BS[:, 4:9])
    assert micro.attention_BS.sum() == rollout.attention_BS.sum()


def test_trimming_what_has_no_padding_changes_nothing():
    rollout = make_rollout().select(torch.tensor([2])).trimmed()
    again = rollout.trimmed()
    assert all(torch.equal(x, getattr(again, n)) for n, x in vars(rollout).items() if isinstance(x, Tensor))


def test_moving_to_a_device_keeps_fields_that_are_no_tensors():
    rollout = make_rollout()
    moved = rollout.to(torch.device("meta"))
    assert moved.tokens_BS.device.type == moved.true_B.device.type == "meta"
    assert moved.prompt_ids == rollout.prompt_ids


# Micro-batches


def columns(rollout: Rollout, part: Tensor) -> int:
    """Rows times columns of a micro-batch without its common padding."""
    return rollout.select(part).trimmed().tokens_BS.numel()


@pytest.mark.parametrize("tokens", [1, 10, 14, 20, 1000])
def test_a_budget_of_tokens_is_kept_and_every_row_comes_once(tokens: int):
    rollout = make_rollout()
    parts = cut(rollout, torch.tensor([3, 0, 2, 1]), sequences=3, tokens=tokens)
    assert sorted(row for part in parts for row in part.tolist()) == [0, 1, 2, 3]
    assert all(len(part) == 1 or columns(rollout, part) <= tokens for part in parts)
    assert all(len(part) <= 3 for part in parts)
    assert len(parts) == {1: 4, 10: 3, 14: 3, 20: 3, 1000: 2}[tokens]


def test_sequences_of_like_length_go_together_so_that_less_is_padding():
    rollout = make_rollout()
    # Prompt and response: (3, 7) and (6, 1) need 13 columns each side by side, (2, 3) and (1, 2) need 5.
    by_length = cut(rollout, torch.arange(4), sequences=2, tokens=1000)
    assert [part.tolist() for part in by_length] == [[2, 1], [0, 3]]
    assert sum(columns(rollout, part) for part in by_length) == 2 * 13 + 2 * 5
    assert [part.tolist() for part in cut(rollout, torch.arange(4), sequences=2)] == [[0, 1], [2, 3]]  # 2 * 9 + 2 * 10


def test_no_rows_are_no_micro_batch():
    assert cut(make_rollout(), torch.arange(0), sequences=2) == cut(make_rollout(), torch.arange(0), 2, 9) == []
