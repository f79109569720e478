"""The Hugging Face sampler: draws, their log-probs, ends and lengths. Episodes: test_episodes.py."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import DynamicCache

from dvpo.policy import Policy
from dvpo.recomputing import recompute
from dvpo.sampling import HuggingFaceSampler, Turn
from dvpo.seeding import derive_seed
from dvpo.settings import SamplingConfig
from responses import assert_same
from tiny_models import (
    END_ID,
    FAMILIES,
    TOKENIZER,
    AsciiPolicy,
    merging_tokenizer,
    response_logprobs,
    tiny_policy,
)

CONTEXTS = [[70, 81, 92], [17] * 9, [40], [33, 44, 100, 200, 90], [12, 13], [250, 8, 30, 31, 60, 61, 62]]
SEEDS = [derive_seed("test", i) for i in range(len(CONTEXTS))]


def sample(
    policy: Policy,
    budget: int | list[int] = 12,
    rows: list[int] | None = None,
    greedy: bool = False,
    **settings: object,
) -> list[Turn]:
    rows = list(range(len(CONTEXTS))) if rows is None else rows
    budgets = [budget] * len(CONTEXTS) if isinstance(budget, int) else budget
    sampler = HuggingFaceSampler(policy, SamplingConfig(**settings), greedy)
    return sampler.sample(*([column[i] for i in rows] for column in (CONTEXTS, budgets, SEEDS)))


# Log-probs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_recorded_logprobs_of_ragged_prompts_are_those_of_a_plain_forward_of_each_row(family, temperature):
    policy = tiny_policy(family)
    for context, turn in zip(CONTEXTS, sample(policy, temperature=temperature), strict=True):
        expected_T = response_logprobs(policy, context, turn.tokens, temperature)
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected_T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_truncation_narrows_the_draw_and_not_the_recorded_logprobs():
    policy = tiny_policy()
    for truncation in ({"top_k": 2}, {"top_p": 0.3}):
        for context, turn in zip(CONTEXTS, sample(policy, **truncation), strict=True):
            expected_T = response_logprobs(policy, context, turn.tokens)
            torch.testing.assert_close(torch.tensor(turn.logprobs), expected_T, rtol=1e-5, atol=1e-5)


# The distribution


def frequencies(policy: Policy, draws: int, **settings: object) -> np.ndarray:
    """How often each token follows the first context."""
    sampler = HuggingFaceSampler(policy, SamplingConfig(batch_size=draws, **settings))
    seeds = [derive_seed("frequencies", i) for i in range(draws)]
    turns = sampler.sample([[2, 5, 3]] * draws, [1] * draws, seeds)
    return np.bincount([turn.tokens[0] for turn in turns], minlength=8)


@torch.no_grad()
def next_probabilities(policy: Policy, temperature: float) -> Tensor:
    logits_V = policy.model(input_ids=torch.tensor([[2, 5, 3]])).logits[0, -1].double()
    return (logits_V / temperature).softmax(-1)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        *[({}, 8), ({"temperature": 2.0}, 8), ({"temperature": 0.5}, 8)],
        *[({"top_k": 3, "temperature": 0.5}, 3), ({"top_p": 0.6, "temperature": 2.0}, None)],
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_truncated_scaled_distribution(settings, kept):
    policy, draws = tiny_policy(vocabulary=8), 4000
    p_V = next_probabilities(policy, settings.get("temperature", 1.0))
    if kept is None:  # the fewest tokens whose mass reaches top_p
        kept = int((p_V.sort(descending=True).values.cumsum(0) < settings["top_p"]).sum()) + 1
        assert 1 < kept < 8
    chosen = p_V.topk(kept).indices.sort().values
    expected = (p_V[chosen] / p_V[chosen].sum() * draws).numpy()
    counts = frequencies(policy, draws, **settings)
    assert counts[chosen].sum() == draws  # nothing outside the truncated support
    common = expected > 5
    statistic = ((counts[chosen][common] - expected[common]) ** 2 / expected[common]).sum()
    assert statistic < stats.chi2.ppf(0.999, df=common.sum() - 1)


def test_the_chi_square_bound_would_notice_another_temperature():
    policy, draws = tiny_policy(vocabulary=8), 4000
    expected = (next_probabilities(policy, 1.2) * draws).numpy()
    statistic = ((frequencies(policy, draws) - expected) ** 2 / expected).sum()
    assert statistic > 2 * stats.chi2.ppf(0.999, df=7)


def test_greedy_takes_the_likeliest_token_of_every_state_and_its_logprob():
    policy = tiny_policy()
    for context, turn in zip(CONTEXTS, sample(policy, greedy=True, temperature=0.5), strict=True):
        row = list(context)
        for token in turn.tokens:
            assert token == int(policy.model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
            row.append(token)
        torch.testing.assert_close(torch.tensor(turn.logprobs), response_logprobs(policy, context, turn.tokens, 0.5))


# Draws are keyed


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_draws_do_not_depend_on_batch_size_order_or_the_rows_beside(family):
    policy = tiny_policy(family)
    alone = [sample(policy, rows=[i])[0] for i in range(len(CONTEXTS))]
    assert_same(sample(policy), alone)
    for size in (1, 4):
        assert_same(sample(policy, batch_size=size), alone)
    order = [4, 1, 5, 0]
    assert_same(sample(policy, rows=order), [alone[i] for i in order])


def test_another_seed_draws_other_tokens_and_the_same_seed_the_same():
    policy = tiny_policy()
    sampler = HuggingFaceSampler(policy, SamplingConfig())
    first, same, other = (sampler.sample([[70]], [12], [seed])[0].tokens for seed in (1, 1, 2))
    assert first == same != other


def test_rows_are_dropped_from_the_batch_once_finished_and_that_changes_nothing(monkeypatch):
    policy, dropped = tiny_policy(), []
    select = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda *a: (dropped.append(len(a[1])), select(*a))[1])
    budgets = [1, 20, 3, 14, 2, 8]
    alone = [sample(policy, budgets, rows=[i])[0] for i in range(len(CONTEXTS))]
    assert dropped == []
    assert_same(sample(policy, budgets), alone)
    assert len(dropped) >= 2


def test_finished_rows_do_not_run_out_of_the_models_positions():
    policy = tiny_policy("gpt2")  # 64 learnt positions
    # The first of five is over at 64 positions; four of five, more than `going_on_share`, and it stays in the batch.
    contexts, budgets, seeds = [[17] * 60, [40, 41], [42], [43], [44]], [4, 30, 30, 30, 30], range(1, 6)
    sampler = HuggingFaceSampler(policy, SamplingConfig())
    together = sampler.sample(contexts, budgets, seeds)
    alone = [sampler.sample(*([c] for c in row))[0] for row in zip(contexts, budgets, seeds, strict=True)]
    assert min(len(turn.tokens) for turn in alone[1:]) > 5
    assert_same(together, alone)


def test_gradient_checkpointing_and_its_training_mode_do_not_change_the_draw():
    policy = tiny_policy()
    expected = sample(policy)
    recompute(policy.model)
    policy.model.train()
    assert_same(sample(policy), expected)  # in training mode transformers would drop the cache, and so the context
    assert policy.model.training


def test_bfloat16_logprobs_are_close_and_the_weights_stay_float32():
    policy = dataclasses.replace(tiny_policy(), dtype=torch.bfloat16)
    turn = sample(policy, budget=3, rows=[0])[0]
    expected_T = response_logprobs(tiny_policy(), CONTEXTS[0], turn.tokens)
    torch.testing.assert_close(torch.tensor(turn.logprobs), expected_T, rtol=0.05, atol=0.2)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


# Ends


def test_a_turn_ends_with_the_first_end_token_which_it_keeps_or_with_its_budget():
    policy = tiny_policy(vocabulary=8)  # one token in eight ends a turn
    policy.model.generation_config.eos_token_id = [END_ID, 6]
    sampler = HuggingFaceSampler(policy, SamplingConfig())
    turns = sampler.sample([[2, 5, 3]] * 60, [5] * 60, range(60))
    for turn in turns:
        assert not {END_ID, 6} & set(turn.tokens[:-1])
        assert turn.finished == (turn.tokens[-1] in {END_ID, 6})
        assert turn.finished or len(turn.tokens) == 5
        assert len(turn.logprobs) == len(turn.tokens)
    assert {turn.tokens[-1] for turn in turns if turn.finished} == {END_ID, 6}
    assert any(not turn.finished for turn in turns)
    assert any(turn.finished and len(turn.tokens) == 5 for turn in turns)  # an end on the last place is an end


def test_a_turn_that_was_cut_is_not_finished_by_what_its_row_goes_on_to_write(monkeypatch):
    monkeypatch.setattr(HuggingFaceSampler, "going_on_share", 0.0)  # rows that are over stay in the batch
    sampler = HuggingFaceSampler(tiny_policy(vocabulary=8), SamplingConfig())
    turns = sampler.sample([[2, 5, 3]] * 30, [1] * 20 + [12] * 10, range(30))
    assert [turn.finished for turn in turns] == [turn.tokens[-1] == END_ID for turn in turns]
    assert any(len(turn.tokens) > 6 for turn in turns[20:])


def test_a_pad_id_that_equals_the_end_id_changes_nothing():
    plain, shared = tiny_policy(vocabulary=8), tiny_policy(vocabulary=8)
    shared.tokenizer.pad_token = shared.tokenizer.eos_token
    assert shared.pad_id == END_ID != plain.pad_id
    contexts = [[2] * (1 + i % 5) for i in range(30)]
    turns = [HuggingFaceSampler(p, SamplingConfig()).sample(contexts, [6] * 30, range(30)) for p in (plain, shared)]
    assert_same(*turns)
    assert any(turn.finished for turn in turns[0])


def test_a_stop_string_ends_the_turn_where_it_is_completed_and_stays_in_its_tokens():
    policy = tiny_policy(kind=AsciiPolicy)
    free = sample(policy, budget=30)
    texts = [TOKENIZER.decode(turn.tokens) for turn in free]
    stop = next(text[4:6] for text in texts if len(text) >= 20)
    stopped = sample(policy, budget=30, stop=(stop, "~"))  # which it never writes
    cut = 0
    for turn, before, text in zip(stopped, free, texts, strict=True):
        place = text.find(stop)
        length = len(before.tokens) if place < 0 else place + len(stop)
        assert turn.tokens == before.tokens[:length]
        assert turn.finished == (before.finished or place >= 0)
        cut += length < len(before.tokens)
    assert cut


class ScriptedPolicy(Policy):
    """Writes `SCRIPT` whatever it reads: the n-th call of `logits` prefers its n-th token."""

    SCRIPT = (72, 264, 73, 74)  # 264 is ">" and newline in one token

    def logits(self, hidden_KD: Tensor) -> Tensor:
        step = self.__dict__.setdefault("steps", [0])
        logits_KV = torch.zeros(len(hidden_KD), 266)
        logits_KV[:, self.SCRIPT[step[0] % len(self.SCRIPT)]] = 50.0
        step[0] += 1
        return logits_KV


def test_a_stop_string_in_the_middle_of_a_token_stops_too():
    policy = ScriptedPolicy(tiny_policy().model, merging_tokenizer())
    assert policy.tokenizer.decode([264]) == ">\n"
    turn = HuggingFaceSampler(policy, SamplingConfig(stop=(">",))).sample([[9]], [4], [0])[0]
    assert turn.tokens == [72, 264]
    assert turn.finished
