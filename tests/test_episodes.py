"""Episodes: turns of policy and environment, prompts that are too long, and the rollout made of them."""

import itertools
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from dvpo.batch import Rollout
from dvpo.encoding import ChatEncoder, fit_prompts, within_context
from dvpo.errors import InputError
from dvpo.policy import Policy
from dvpo.sampling import Episode, HuggingFaceSampler, Turn, begin, collate, play, step
from dvpo.scoring import place
from dvpo.settings import SamplingConfig
from dvpo.tasks import Example, Prompt, SingleTurn, Step
from tiny_models import END_ID, TOKENIZER, AsciiPolicy, merging_tokenizer, tiny_policy, with_begin_token

BAD_ID = 7  # <|bad|>


def ids(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


class Quiz:
    """Three turns: asks back twice and gives .5 for each answer, then ends with a reward of 2."""

    REPLY = ({"role": "user", "content": "And then?"},)

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.heard = prompt, []

    def reset(self) -> Prompt:
        return self.prompt

    def step(self, response: str) -> Step:
        self.heard.append(response)
        done = len(self.heard) == 3
        return Step(messages=() if done else self.REPLY, reward=2.0 if done else 0.5, done=done)


class Script:
    """A sampler that writes what it is told, turn by turn, and remembers what it was asked."""

    def __init__(self, *turns: list[int], finished: Sequence[bool] = (True, True, True)) -> None:
        self.turns, self.finished, self.asked = turns, finished, []

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        turn = len(self.asked)
        self.asked.append((list(contexts[0]), budgets[0], seeds[0]))
        logprobs = [-0.1 * (i + 1) for i in range(len(self.turns[turn]))]
        return [Turn(self.turns[turn], logprobs, self.finished[turn])]


ASK = [{"role": "user", "content": "Count."}]


def converse(script: Script, *, tokenizer=TOKENIZER, **settings: object) -> tuple[Episode, Quiz]:
    quiz, encoder = Quiz(ASK), ChatEncoder(tokenizer)
    episode = Episode(Example("quiz", ASK), visit=0, sample=0, prompt_tokens=encoder.prompt(ASK))
    play([episode], [quiz], script, encoder, SamplingConfig(**{"max_completion_length": 200, **settings}), seed=0)
    return episode, quiz


# Several turns


def test_three_turns_are_the_very_tokens_of_the_rendered_conversation():
    episode, quiz = converse(Script(ids("one<|end|>"), ids("two<|end|>"), ids("three<|end|>")))
    spoken = [*ASK, *(m for word in ("one", "two") for m in ({"role": "assistant", "content": word}, *Quiz.REPLY))]
    conversation = [*spoken, {"role": "assistant", "content": "three"}]
    assert episode.prompt_tokens + episode.tokens == ids(TOKENIZER.apply_chat_template(conversation, tokenize=False))
    assert [*ASK, *episode.messages] == conversation
    assert quiz.heard == ["one", "two", "three"]
    assert episode.text == "one\ntwo\nthree"
    assert episode.terminated


def test_tokens_of_the_environment_are_outside_the_mask_and_have_no_logprob():
    episode, _ = converse(Script(ids("one<|end|>"), ids("two<|end|>"), ids("three<|end|>")))
    reply = len(ids("<|user|>And then?<|end|><|assistant|>"))
    assert episode.turns == [0] * 4 + [-1] * reply + [1] * 4 + [-1] * reply + [2] * 6
    assert [x for x, turn in zip(episode.logprobs, episode.turns, strict=True) if turn < 0] == [0.0] * 2 * reply
    assert episode.logprobs[:4] == episode.logprobs[4 + reply :][:4] == pytest.approx([-0.1, -0.2, -0.3, -0.4])


def test_rewards_of_the_turns_land_on_the_last_policy_token_of_each_turn():
    episode, _ = converse(Script(ids("one<|end|>"), ids("two<|end|>"), ids("three<|end|>")))
    assert episode.turn_rewards == [0.5, 0.5, 2.0]
    rewards = place(list(episode.turn_rewards), episode)
    landed = {i: reward for i, reward in enumerate(rewards) if reward}
    last = [max(i for i, turn in enumerate(episode.turns) if turn == n) for n in range(3)]
    assert landed == dict(zip(last, [0.5, 0.5, 2.0], strict=True))
    assert [episode.tokens[i] for i in last] == [END_ID] * 3


def test_sampled_tokens_are_kept_although_decoding_and_encoding_them_gives_others():
    tokenizer = merging_tokenizer()
    one, two = ids("1")[0], ids("2")[0]
    assert tokenizer(tokenizer.decode([one, two])).input_ids == [265]
    script = Script([one, two, END_ID], [two, END_ID], [one, END_ID])
    episode, quiz = converse(script, tokenizer=tokenizer)
    assert episode.tokens[:3] == [one, two, END_ID]
    for context, later in itertools.pairwise(context for context, *_ in script.asked):
        assert later[: len(context)] == context  # what was seen and written once is never written anew
    assert quiz.heard[0] == "12"


def test_a_turn_that_ended_by_a_stop_string_gets_its_end_token_from_the_template():
    episode, quiz = converse(Script(ids("one."), ids("two."), ids("three.")), stop=(".",))
    reply = [1, *ids("<|user|>And then?<|end|><|assistant|>")]
    assert episode.tokens == [*ids("one."), *reply, *ids("two."), *reply, *ids("three.")]
    assert episode.turns[4] == -1  # the template's end token is not the policy's
    assert quiz.heard == ["one", "two", "three"]


def test_the_environment_hears_nothing_of_what_stands_behind_a_stop_string_in_the_same_token():
    tokenizer = merging_tokenizer()
    _, quiz = converse(Script([*ids("a"), 264], ids("b>"), ids("c>")), tokenizer=tokenizer, stop=(">",))
    assert quiz.heard == ["a", "b", "c"]


def test_an_end_token_that_is_not_the_tokenizers_eos_is_not_written_twice():
    tokenizer = TOKENIZER.__class__(
        tokenizer_object=TOKENIZER.backend_tokenizer,
        eos_token="<|end|>",
        chat_template=TOKENIZER.chat_template.replace("<|end|>", "<|bad|>\n"),
    )
    rest = ids("\n<|user|>And then?<|bad|>\n<|assistant|>")
    assert ChatEncoder(tokenizer).reply(Quiz.REPLY, BAD_ID) == rest
    assert ChatEncoder(tokenizer).reply(Quiz.REPLY, END_ID) == [BAD_ID, *rest]
    assert ChatEncoder(tokenizer).reply(Quiz.REPLY, ids("x")[0]) == [BAD_ID, *rest]


@pytest.mark.parametrize("fits", [False, True])
def test_a_reply_that_leaves_no_room_for_another_word_cuts_the_episode_and_keeps_the_turns_reward(fits):
    first, reply = ids("one<|end|>"), ids("<|user|>And then?<|end|><|assistant|>")
    script = Script(first, ids("t"), finished=[True, False])
    episode, _ = converse(script, max_completion_length=len(first) + len(reply) + fits)
    assert not episode.terminated
    assert episode.tokens == ([*first, *reply, *ids("t")] if fits else first)
    assert episode.turn_rewards == [0.5, None][: 1 + fits]
    assert [m["role"] for m in episode.messages] == ["assistant", "user", "assistant"][: 3 if fits else 1]
    assert [budget for _, budget, _ in script.asked][1:] == [1] * fits


def test_a_turn_cut_by_the_length_limit_is_truncated_and_never_heard():
    episode, quiz = converse(Script(ids("one"), finished=[False]))
    assert not episode.terminated
    assert (quiz.heard, episode.turn_rewards, episode.text) == ([], [None], "one")


def test_every_turn_and_sample_draws_with_a_seed_of_its_own():
    script = Script(ids("one<|end|>"), ids("two<|end|>"), ids("three<|end|>"))
    converse(script)
    again = Script(ids("one<|end|>"), ids("two<|end|>"), ids("three<|end|>"))
    converse(again)
    seeds = [seed for *_, seed in script.asked]
    assert len(set(seeds)) == 3
    assert seeds == [seed for *_, seed in again.asked]
    first = {}
    for name, visit, sample, run in (("a", 0, 0, 0), ("b", 0, 0, 0), ("a", 1, 0, 0), ("a", 0, 1, 0), ("a", 0, 0, 1)):
        one = Script([END_ID])
        play([Episode(Example(name, "x"), visit, sample, [9])], [SingleTurn(Example(name, "x"))], one,
             ChatEncoder(TOKENIZER), SamplingConfig(), seed=run)  # fmt: skip
        first[name, visit, sample, run] = one.asked[0][2]
    assert len(set(first.values())) == 5


# With a model


def play_quizzes(policy: Policy, count: int, **settings: object) -> list[Episode]:
    encoder = ChatEncoder(policy.tokenizer)
    prompts = [[{"role": "user", "content": "Count to " + "9" * i}] for i in range(count)]
    episodes = [Episode(Example(f"quiz {i}", p), 0, 0, encoder.prompt(p)) for i, p in enumerate(prompts)]
    chosen = SamplingConfig(**{"max_completion_length": 70, "stop": ("a", "+"), **settings})
    play(episodes, [Quiz(p) for p in prompts], HuggingFaceSampler(policy, chosen), encoder, chosen, seed=0)
    return episodes


def to_rollout(episodes: Sequence[Episode], pad_id: int = 0) -> Rollout:
    width = max(len(e.tokens) for e in episodes)
    unknown_B = torch.full((len(episodes),), math.nan)
    scores = {"rewards_BT": torch.zeros(len(episodes), width), "rewarded_B": unknown_B > 0}
    return collate(episodes, scores | {"observed_B": unknown_B, "true_B": unknown_B}, pad_id, policy_version=3)


@pytest.mark.parametrize("pad_id", [0, END_ID])
@torch.no_grad()
def test_the_trainers_logprobs_of_a_multi_turn_rollout_equal_the_samplers_at_every_policy_token(pad_id):
    policy = tiny_policy(kind=AsciiPolicy)
    episodes = play_quizzes(policy, 5, temperature=0.8)
    assert max(max(e.turns) for e in episodes) >= 1  # several turns are played
    rollout = to_rollout(episodes, pad_id)
    hidden_BSD = policy.hidden_states(rollout.tokens_BS, rollout.attention_BS)
    states_BTD, mask_BT = hidden_BSD[:, rollout.prompt_length - 1 : -1], rollout.mask_BT
    logprobs_K, _ = policy.token_logprobs(states_BTD[mask_BT], rollout.response_BT[mask_BT], temperature=0.8)
    torch.testing.assert_close(logprobs_K, rollout.sampler_logprobs_BT[mask_BT], rtol=1e-5, atol=1e-5)
    # One column off, as with the state behind the token, nothing fits.
    late_K, _ = policy.token_logprobs(
        hidden_BSD[:, rollout.prompt_length :][mask_BT], rollout.response_BT[mask_BT], temperature=0.8
    )
    assert (late_K - rollout.sampler_logprobs_BT[mask_BT]).abs().mean() > 0.1


def test_a_conversation_does_not_depend_on_the_conversations_beside_it():
    policy = tiny_policy(kind=AsciiPolicy)
    together, others = play_quizzes(policy, 5), play_quizzes(policy, 5, batch_size=2)
    fewer = play_quizzes(policy, 2)
    assert [e.tokens for e in together] == [e.tokens for e in others]
    assert [e.tokens for e in together[:2]] == [e.tokens for e in fewer]


# The rollout


def test_collate_pads_prompts_left_and_responses_right_and_records_ends_by_the_samplers_word():
    ended = Episode(Example("a", "x"), 2, 0, [9, 10], tokens=[11, END_ID], turns=[0, 0], logprobs=[-1.0, -2.0])
    ended.terminated = True
    cut = Episode(Example("b", "y"), 0, 1, [12], tokens=[END_ID, 13, 14], turns=[0, -1, 1], logprobs=[-3.0, 0.0, -4.0])
    rollout = to_rollout([ended, cut], pad_id=END_ID)
    assert rollout.tokens_BS.tolist() == [[9, 10, 11, 1, 1], [1, 12, 1, 13, 14]]
    assert rollout.attention_BS.int().tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert rollout.mask_BT.int().tolist() == [[1, 1, 0], [1, 0, 1]]  # the sampled end token is inside
    assert rollout.turns_BT.tolist() == [[0, 0, -1], [0, -1, 1]]
    assert rollout.sampler_logprobs_BT.tolist() == [[-1, -2, 0], [-3, 0, -4]]
    assert rollout.terminated_B.tolist() == [True, False]
    assert rollout.truncated_B.tolist() == [False, True]
    assert rollout.response_BT.tolist() == [[11, 1, 1], [1, 13, 14]]
    assert (rollout.prompt_ids, rollout.visits, rollout.samples) == (("a", "b"), (2, 0), (0, 1))
    assert rollout.policy_version == 3


# Prompts


def fit(prompts: Sequence[Prompt], context: int = 100, **settings: object) -> dict[str, list[int]]:
    examples = [Example(f"p{i}", prompt) for i, prompt in enumerate(prompts)]
    chosen = SamplingConfig(**{"max_prompt_length": 5, "max_completion_length": 10, **settings})
    fitted = fit_prompts(examples, ChatEncoder(TOKENIZER), chosen, context)
    return {name: list(tokens) for name, tokens in fitted.items()}


def test_strings_stand_as_they_are_and_messages_go_through_the_template():
    fitted = fit(["abc", [{"role": "user", "content": "a"}]])
    assert fitted == {"p0": ids("abc"), "p1": ids("<|user|>a<|end|><|assistant|>")}


def test_overlong_prompts_are_refused_left_out_or_keep_their_last_tokens():
    with pytest.raises(InputError, match=r"prompt p1 has 7 tokens.*max_prompt_length = 5.*skip or truncate"):
        fit(["abc", "abcdefg"])
    assert fit(["abc", "abcdefg"], long_prompts="skip") == {"p0": ids("abc")}
    assert fit(["abc", "abcdefg"], long_prompts="truncate")["p1"] == ids("cdefg")
    with pytest.raises(InputError, match="no prompt of train fits"):
        fit(["abcdefg"], long_prompts="skip")


def test_a_prompt_that_an_environment_changed_is_held_to_the_same_limit():
    class Longer(SingleTurn):
        def reset(self) -> str:
            return "abcdefg"

    task = SimpleNamespace(environment=Longer)
    example, encoder = Example("p", "abc"), ChatEncoder(TOKENIZER)
    cut = SamplingConfig(max_prompt_length=5, long_prompts="truncate")
    assert begin(task, example, 0, 0, {"p": ids("abc")}, encoder, cut)[0].prompt_tokens == ids("cdefg")
    with pytest.raises(InputError, match=r"the environment of prompt p gave a prompt of 7 tokens.* = 5: raise it"):
        begin(task, example, 0, 0, {"p": ids("abc")}, encoder, SamplingConfig(max_prompt_length=5))


class Broken(SingleTurn):
    def reset(self) -> Prompt:
        return self.example.columns["digit"]

    def step(self, response: str) -> Step:
        return int(response)


def test_an_environment_that_raises_ends_the_run_in_a_sentence_with_prompt_exception_and_line():
    example = Example("p7", "Guess.")
    task = SimpleNamespace(environment=Broken)
    with pytest.raises(InputError, match=r"prompt p7 raised KeyError: 'digit' \(test_episodes.py:\d+\): mend it") as no:
        begin(task, example, 0, 0, {"p7": [5]}, ChatEncoder(TOKENIZER), SamplingConfig())
    assert isinstance(no.value.__cause__, KeyError)
    with pytest.raises(InputError, match=r"environment of prompt p7 raised ValueError: invalid literal"):
        step(Broken(example), example, "seven")


def test_an_environment_that_raises_in_a_step_ends_its_episode_alone_and_nobody_knows_its_worth():
    class Losing(Quiz):
        def step(self, response: str) -> Step:
            return super().step(response) if response == "one" else 1 / 0

    encoder = ChatEncoder(TOKENIZER)
    whole, lost = [Episode(Example(name, ASK), 0, 0, encoder.prompt(ASK)) for name in ("whole", "lost")]
    words = iter(["one", "two", "six"])
    sampler = SimpleNamespace(sample=lambda c, *_: [Turn(ids(f"{next(words)}<|end|>"), [-0.1] * 4, True)] * len(c))
    play([whole, lost], [Quiz(ASK), Losing(ASK)], sampler, encoder, SamplingConfig(max_completion_length=99), seed=0)
    assert (whole.turn_rewards, whole.fault, whole.terminated) == ([0.5, 0.5, 2.0], None, True)
    assert lost.text == "one\ntwo"
    assert lost.turn_rewards == [0.5, None]
    assert lost.terminated  # the length limit did not cut it
    assert re.fullmatch(r"the environment of prompt lost raised ZeroDivisionError: .* \(test_\w+.py:\d+\)", lost.fault)


@pytest.mark.parametrize("answer", [None, 7, ((), 1.0, True), Step((), "much", True), Step(None, None, False)])
def test_an_answer_that_is_no_step_is_refused_with_the_prompt(answer):
    environment = SimpleNamespace(step=lambda response: answer)
    with pytest.raises(InputError, match=r"of prompt p7 answered .*: let its method step return a dvpo.tasks.Step"):
        step(environment, Example("p7", "Guess."), "7")


def test_prompt_and_completion_must_fit_the_models_context():
    assert fit(["abc"], context=13) == {"p0": ids("abc")}  # the limits together exceed it, the prompts do not
    with pytest.raises(InputError, match=r"context of 12 tokens \(longest prompt: 3\)"):
        fit(["abc"], context=12)
    with pytest.raises(InputError, match=r"sampling.max_prompt_length=8 sampling.max_completion_length=10$"):
        fit(["abc"], context=18, max_completion_length=16)
    assert fit(["abc"], context=18, max_prompt_length=8, max_completion_length=10)
    with pytest.raises(InputError, match=r"sampling.max_prompt_length=9 sampling.max_completion_length=1$"):
        fit(["abcdefghi"], context=10)
    with pytest.raises(InputError, match="shorten the prompts"):
        fit(["abcdefghij"], context=10)
    assert fit(["abcd"], context=12, long_prompts="truncate") == {"p0": ids("cd")}
    with pytest.raises(InputError, match="context of 10 tokens"):
        fit(["abc"], context=10, long_prompts="truncate")


def test_where_the_context_leaves_too_little_a_message_names_what_takes_it():
    with pytest.raises(
        InputError, match=r"fits the 3 tokens .*max_completion_length = 10 leaves .* context of 13: lower it"
    ):
        fit(["abcd"], context=13, long_prompts="skip")
    settings = SamplingConfig(max_prompt_length=5, max_completion_length=10)
    assert [within_context(settings, n).max_prompt_length for n in (15, 13)] == [5, 3]
    with pytest.raises(InputError, match=r"max_completion_length = 10 fills the model's context of 10 tokens"):
        within_context(settings, 10)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="prompt p1 is empty"):
        fit(["a", ""])


def test_a_string_that_starts_with_the_begin_token_gets_no_other():
    tokenizer = with_begin_token(merging_tokenizer())
    encoder = ChatEncoder(tokenizer)
    assert encoder.prompt("a") == encoder.prompt("<|bad|>a") == [BAD_ID, *ids("a")]


@pytest.mark.parametrize("begun", ["<think>\n\n</think>\n\n", "Sure: "])
def test_a_prompt_that_ends_with_the_assistants_words_lets_the_response_go_on_with_them(begun: str):
    prompt = [*ASK, {"role": "assistant", "content": begun}]
    assert ChatEncoder(TOKENIZER).prompt(prompt) == ids(f"<|user|>Count.<|end|><|assistant|>{begun}")
    assert ChatEncoder(TOKENIZER).reply([], END_ID) == ids("<|assistant|>")  # a turn that is over is not gone on with
    dropping = merging_tokenizer()
    dropping.chat_template = TOKENIZER.chat_template.replace("message['content']", "message['content'].split()[-1]")
    with pytest.raises(InputError, match=r"refuses a prompt .*: mend its roles, or the assistant's message at its end"):
        ChatEncoder(dropping).prompt([*ASK, {"role": "assistant", "content": "one two "}])


def test_what_the_template_is_told_holds_for_the_prompt_and_for_every_later_turn():
    tokenizer = merging_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt and enable_thinking is false %}{{ '[no]' }}{% endif %}"
    encoder = ChatEncoder(tokenizer, {"enable_thinking": False})
    assert encoder.prompt(ASK) == ids("<|user|>Count.<|end|><|assistant|>[no]")
    assert encoder.reply(Quiz.REPLY, END_ID) == ids("<|user|>And then?<|end|><|assistant|>[no]")
    assert encoder.prompt([*ASK, {"role": "assistant", "content": "1"}]) == ids("<|user|>Count.<|end|><|assistant|>1")
    assert ChatEncoder(tokenizer).prompt(ASK) == ids("<|user|>Count.<|end|><|assistant|>")


def test_messages_without_a_chat_template_and_roles_that_it_refuses_are_input_errors():
    plain = merging_tokenizer()
    plain.chat_template = None
    assert ChatEncoder(plain).reply(Quiz.REPLY, END_ID) == plain("And then?").input_ids
    with pytest.raises(InputError, match="no chat template"):
        ChatEncoder(plain).prompt(ASK)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        ChatEncoder(plain).prompt(ASK)
    plain.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="does not show the assistant's words"):
        ChatEncoder(plain).reply(Quiz.REPLY, END_ID)
