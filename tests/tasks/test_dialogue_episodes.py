"""Whole dialogue episodes between a model and the user: their tokens, masks and rewards."""

import re

import pytest
from test_dialogue import ENCODER, TASK

from dialogues import replay, turns_of
from dvpo.embedded import make_config, make_model
from dvpo.loading import TASK_DEFAULTS
from dvpo.sampling import Episode, HuggingFaceSampler, Turn, collate, play
from dvpo.scoring import Scorer
from dvpo.settings import SamplingConfig
from dvpo.tasks.dialogue import Conversation, SlotFilling
from dvpo.tasks.dialogue_agents import converse, expert
from tiny_models import AsciiPolicy

ROOM = TASK_DEFAULTS["dialogue"]["sampling"]["max_completion_length"]


class Script:
    """A sampler that writes given turns, whatever it reads, each ended or cut as the budget says."""

    def __init__(self, turns):
        self.turns = iter(turns)

    def sample(self, contexts, budgets, seeds):
        (budget,) = budgets
        tokens = [*ENCODER.tokenizer(next(self.turns)).input_ids, ENCODER.tokenizer.eos_token_id]
        return [Turn(tokens[:budget], [-1.0] * len(tokens[:budget]), len(tokens) <= budget)]


def episode_of(task, example, sampler, room=ROOM):
    """One episode of the sampler with the task's environment."""
    environment = task.environment(example)
    episode = Episode(example, visit=0, sample=0, prompt_tokens=ENCODER.prompt(environment.reset()))
    play([episode], [environment], sampler, ENCODER, SamplingConfig(max_completion_length=room), seed=0)
    return episode


def rollout_of(task, *episodes):
    scored = Scorer(task, None)(episodes)
    assert scored.faults == []
    return collate(episodes, scored.fields, pad_id=0, policy_version=0)


def test_the_oracles_episode_reads_as_the_chat_does_and_its_reward_lands_on_the_policys_last_token():
    task = SlotFilling(train=20, id=0, ood=0)
    for example in task.split("train"):
        messages = converse(task.environment(example), expert)
        episode = episode_of(task, example, Script(turns_of(messages)))
        # Token for token what the chat template makes of the conversation, whose last message a prompt leaves open.
        eos = ENCODER.tokenizer.eos_token_id
        assert [*episode.prompt_tokens, *episode.tokens] == [*ENCODER.prompt(messages), eos]
        rollout = rollout_of(task, episode)
        written = [t for t, mask in zip(episode.tokens, rollout.mask_BT[0].tolist(), strict=True) if mask]
        assert ENCODER.tokenizer.decode(written) == "".join(f"{turn}<|end|>" for turn in turns_of(messages))
        rewards_T = rollout.rewards_BT[0]
        assert bool(rollout.terminated_B[0])
        assert float(rollout.true_B[0]) == pytest.approx(1)
        assert (rewards_T[~rollout.mask_BT[0]] == 0).all()
        assert rewards_T.nonzero().flatten().tolist() == [len(episode.tokens) - 1]
        assert episode.tokens[-1] == ENCODER.tokenizer.eos_token_id
        assert replay(task.goal(example), turns_of(episode.messages)) == (1, 1, 1)


def test_the_environment_tells_an_evaluation_its_figures():
    goal = TASK.goal(TASK.split("id")[0])
    conversation = Conversation(goal)
    assert conversation.figures() == {"tcr": 0, "acr": 0, "gcr": 0}
    converse(conversation, expert)
    assert conversation.figures() == {"tcr": 1, "acr": 1, "gcr": 1}


def test_an_episode_that_is_cut_has_earned_a_known_zero():
    task = SlotFilling(train=20, id=0, ood=0)
    example = next(e for e in task.split("train") if len(task.goal(e).missing) == 2)
    script = turns_of(converse(task.environment(example), expert))
    whole = episode_of(task, example, Script(script))
    in_last_turn = episode_of(task, example, Script(script), room=len(whole.tokens) - 3)
    no_room_for_a_reply = episode_of(task, example, Script(script), room=whole.turns.index(1))
    rollout = rollout_of(task, whole, in_last_turn, no_room_for_a_reply)
    assert rollout.truncated_B.tolist() == [False, True, True]
    assert rollout.rewarded_B.tolist() == [True, True, True]  # not withheld from learning
    assert rollout.true_B.tolist() == pytest.approx([1, 0, 0])


def test_a_random_model_talks_with_the_user_in_several_turns_whose_tokens_are_masked():
    policy = AsciiPolicy(make_model(make_config(32, 1, 64)).eval(), ENCODER.tokenizer)
    sampling = SamplingConfig(max_completion_length=ROOM)
    examples = TASK.split("train")[:8]
    environments = [TASK.environment(example) for example in examples]
    episodes = [
        Episode(e, 0, 0, ENCODER.prompt(environment.reset()))
        for e, environment in zip(examples, environments, strict=True)
    ]
    play(episodes, environments, HuggingFaceSampler(policy, sampling), ENCODER, sampling, seed=0)
    rollout = rollout_of(TASK, *episodes)
    assert max(rollout.turns_BT.amax(1).tolist()) > 2
    for episode, mask_T, rewards_T in zip(episodes, rollout.mask_BT, rollout.rewards_BT, strict=True):
        heard = [t for t, masked in zip(episode.tokens, (~mask_T).tolist(), strict=False) if masked]
        replies = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in episode.messages if m["role"] != "assistant")
        assert re.sub(r"<\|assistant\|>", "", ENCODER.tokenizer.decode(heard)) == replies
        assert (rewards_T == 0).all()  # babble earns nothing
        assert replay(TASK.goal(episode.example), turns_of(episode.messages)) == (0, 0, 0)
