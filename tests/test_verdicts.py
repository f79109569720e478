"""What a warm start has taught: verdicts are read where they should be, and judged as by hand."""

import math

import pytest
import torch

from dvpo.embedded import make_model, make_tokenizer
from dvpo.policy import Policy
from dvpo.sampling import Episode
from dvpo.tasks import Example
from dvpo.verdicts import judge_verdicts, read_verdicts, verdict

TOKENIZER = make_tokenizer()


def test_the_verdict_is_the_log_odds_of_good_against_bad():
    logits = torch.zeros(264)
    logits[TOKENIZER.convert_tokens_to_ids("<|good|>")] = 2.0
    logits[TOKENIZER.convert_tokens_to_ids("<|bad|>")] = -1.0
    assert verdict(logits, TOKENIZER) == 3.0


def test_verdicts_are_read_at_the_prompts_end_half_way_and_before_the_last_token_of_each_episode_alone():
    policy = Policy(make_model(), TOKENIZER)
    episodes = [
        Episode(Example("a", "q"), 0, 0, prompt_tokens=[2, 3, 4], tokens=[20, 21, 22, 23, 1]),
        Episode(Example("b", "q"), 0, 0, prompt_tokens=[5], tokens=[30, 1]),
    ]
    with torch.no_grad():
        verdicts = read_verdicts(policy, episodes)
        # Eight tokens: places 2, (2 + 6) // 2, 6. Three tokens: places 0, 0, 1.
        for row, places in enumerate(((2, 4, 6), (0, 0, 1))):
            ids = torch.tensor([episodes[row].prompt_tokens + episodes[row].tokens])
            expected_S = verdict(policy.model(ids).logits[0], TOKENIZER)
            found = torch.stack([verdicts[name][row] for name in ("first", "middle", "last")])
            torch.testing.assert_close(found, expected_S[list(places)])


def test_verdicts_are_judged_as_by_hand():
    figures = judge_verdicts({"last": torch.tensor([2.0, 0.0, 0.0, -1.0])}, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    # Pairs right against wrong: 2 beats 0 and -1, 0 ties with 0 and beats -1: 3.5 of 4.
    assert figures["auroc_last"] == 0.875
    # Probabilities .881 .5 .5 .269, mean .537: covariance sum .5 (.344 - .037 + .037 + .268) = .306,
    # norms sqrt(.119 + .001 + .001 + .072) = .440 and 1.
    assert figures["corr_last"] == pytest.approx(0.306 / 0.440, abs=0.003)


def test_where_nothing_is_right_there_is_nothing_to_tell_apart():
    figures = judge_verdicts({"last": torch.tensor([2.0, 0.0])}, torch.tensor([0.0, 0.0]))
    assert math.isnan(figures["auroc_last"])
    assert figures["corr_last"] == 0
