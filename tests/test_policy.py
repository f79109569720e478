"""The policy: log-probs are those of transformers' own forward, whatever chunks, padding and neighbours."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from dvpo import policy as policy_module
from dvpo.checkpoint import Checkpointer
from dvpo.embedded import make_tokenizer
from dvpo.errors import InputError
from dvpo.policy import Policy, check_head, choose_device, open_policy
from dvpo.recomputing import recomputes
from dvpo.sampling import pad_left
from largest_tensor import LargestTensor
from tiny_models import END_ID, FAMILIES, TOKENIZER, one_row, response_logprobs, tiny_config, tiny_policy

CPU = torch.device("cpu")
PROMPT, RESPONSE = [70, 81, 92, 17, 40], [33, 44, 1, 200, 90, 33]


def save(folder: Path, family: str = "llama", tokenizer=TOKENIZER) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def logprobs_and_entropies(policy: Policy, temperature: float = 1.0, entropy: bool = True) -> tuple[Tensor, Tensor]:
    tokens_BS, attention_BS = one_row(PROMPT + RESPONSE)
    hidden_KD = policy.hidden_states(tokens_BS, attention_BS)[0, :-1]
    return policy.token_logprobs(hidden_KD, tokens_BS[0, 1:], temperature, entropy)


def reference(policy: Policy, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    tokens_BS, _ = one_row(PROMPT + RESPONSE)
    log_p_KV = (policy.model(input_ids=tokens_BS).logits[0, :-1].float() / temperature).log_softmax(-1)
    return log_p_KV.gather(-1, tokens_BS[0, 1:, None])[:, 0], -(log_p_KV.exp() * log_p_KV).sum(-1)


def gradients(policy: Policy, loss: Tensor) -> list[Tensor]:
    policy.model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


# Values and gradients


@pytest.mark.parametrize("logits_at_once", [1 << 24, 3 * 264, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_entropies_and_gradients_are_those_of_the_models_own_logits(family, logits_at_once, monkeypatch):
    monkeypatch.setattr(policy_module, "LOGIT_BUDGET", logits_at_once)  # one chunk, chunks of 3 tokens, of 1
    policy, weights_K = tiny_policy(family), torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.7):
        results = []
        for logprobs_K, entropies_K in (logprobs_and_entropies(policy, temperature), reference(policy, temperature)):
            loss = (weights_K[0] * logprobs_K + weights_K[1] * entropies_K).sum()
            results.append([logprobs_K, entropies_K, *gradients(policy, loss)])
        assert len(results[0]) == len(results[1])
        for ours, theirs in zip(*results, strict=True):
            # Sums in another order: the last digits differ from machine to machine, 1.6e-5 were seen.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("logits_at_once", [1 << 24, 3 * 264])
def test_an_entropy_that_is_only_reported_leaves_the_gradient_alone(logits_at_once, monkeypatch):
    monkeypatch.setattr(policy_module, "LOGIT_BUDGET", logits_at_once)
    policy = tiny_policy()
    logprobs_K, entropies_K = logprobs_and_entropies(policy, entropy=False)
    torch.testing.assert_close(entropies_K, reference(policy)[1])
    ours = gradients(policy, (logprobs_K + 3 * entropies_K).sum())
    theirs = gradients(policy, reference(policy)[0].sum())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_made_forward_or_backward(monkeypatch):
    policy, chunk, count = tiny_policy(), 40, 400
    monkeypatch.setattr(policy_module, "LOGIT_BUDGET", chunk * 264)
    hidden_KD = torch.randn(count, 16, requires_grad=True)
    tokens_K = torch.randint(264, (count,))
    with LargestTensor() as ours:
        logprobs_K, entropies_K = policy.token_logprobs(hidden_KD, tokens_K)
        (logprobs_K + entropies_K).sum().backward()
    assert ours.entries == chunk * 264
    with LargestTensor() as naive:
        policy.logits(hidden_KD).log_softmax(-1).gather(-1, tokens_K[:, None]).sum().backward()
    assert naive.entries == count * 264


def test_no_tokens_give_no_logprobs_and_no_error():
    logprobs_K, entropies_K = tiny_policy().token_logprobs(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))
    assert logprobs_K.shape == entropies_K.shape == (0,)


# Dropout and precision


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_is_off_so_that_a_policys_ratio_to_itself_is_exactly_one(family, gradient_checkpointing, tmp_path):
    folder = save(tmp_path, family)
    policy = open_policy(folder, CPU, gradient_checkpointing=gradient_checkpointing)
    first, second = logprobs_and_entropies(policy)[0], logprobs_and_entropies(policy)[0]
    assert torch.equal((first - second).exp(), torch.ones_like(first))
    # The folder's config asks for dropout: the plain model, trained as it comes, has no such ratio.
    careless = Policy(AutoModelForCausalLM.from_pretrained(folder).train(), TOKENIZER)
    assert not torch.equal(logprobs_and_entropies(careless)[0], logprobs_and_entropies(careless)[0])


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    folder = save(tmp_path, "gpt2")
    plain, saving = open_policy(folder, CPU), open_policy(folder, CPU, gradient_checkpointing=True)
    assert recomputes(saving.model)
    ours, theirs = (gradients(p, logprobs_and_entropies(p)[0].sum()) for p in (saving, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_is_a_compute_type_over_float32_weights_and_float32_logprobs(tmp_path):
    folder = save(tmp_path)
    policy = open_policy(folder, CPU, dtype="bfloat16")
    tokens_BS, attention_BS = one_row(PROMPT + RESPONSE)
    assert policy.trunk.layers[0].mlp.up_proj(torch.zeros(1, 16)).dtype is torch.float32
    with policy.autocast():
        assert policy.trunk.layers[0].mlp.up_proj(torch.zeros(1, 16)).dtype is torch.bfloat16
    hidden_KD = policy.hidden_states(tokens_BS, attention_BS)[0, :-1]
    logprobs_K, entropies_K = policy.token_logprobs(hidden_KD, tokens_BS[0, 1:])
    assert logprobs_K.dtype is entropies_K.dtype is torch.float32
    torch.testing.assert_close(logprobs_K, reference(open_policy(folder, CPU))[0], rtol=0.05, atol=0.15)
    logprobs_K.sum().backward()
    weight = policy.trunk.layers[0].mlp.up_proj.weight
    assert {p.dtype for p in policy.model.parameters()} == {weight.grad.dtype} == {torch.float32}
    before = weight.detach().clone()
    torch.optim.SGD([weight], lr=1e-5).step()
    moved = (weight != before).float().mean()
    moved_in_bfloat16 = (before.bfloat16() - 1e-5 * weight.grad.bfloat16() != before.bfloat16()).float().mean()
    assert moved > 0.5
    assert moved_in_bfloat16 < 0.1  # so small a step is what master weights are for


# Padding and neighbours


def padded_logprobs(policy: Policy, left: int, right: int, pad_id: int, neighbours: list[list[int]]) -> Tensor:
    """Log-probs of RESPONSE in a batch: prompts padded on the left, responses on the right."""
    prompts_BP, prompt_attention_BP = pad_left([PROMPT, *neighbours, [pad_id] * (len(PROMPT) + left)], pad_id)
    tail = torch.full((len(prompts_BP), right), pad_id)
    response_BT = torch.tensor([RESPONSE] * len(prompts_BP))
    tokens_BS = torch.cat([prompts_BP, response_BT, tail], 1)
    attention_BS = torch.cat([prompt_attention_BP, torch.ones_like(response_BT) > 0, torch.zeros_like(tail) > 0], 1)
    hidden_BSD = policy.hidden_states(tokens_BS[:-1], attention_BS[:-1])
    start = prompts_BP.shape[1]
    states_TD = hidden_BSD[0, start - 1 : start - 1 + len(RESPONSE)]
    return policy.token_logprobs(states_TD, torch.tensor(RESPONSE))[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_either_side_neighbours_and_the_pad_id_change_nothing(family):
    policy = tiny_policy(family)
    expected_T = response_logprobs(policy, PROMPT, RESPONSE)
    for left, right, pad_id, neighbours in (
        (0, 0, 0, []),
        (7, 0, 0, []),
        (0, 5, 0, []),
        (0, 0, 0, [[9] * 11, [12, 13]]),
        (3, 4, END_ID, [[9] * 11]),  # pad id = end id
        (3, 4, 200, []),  # what stands at padded places means nothing
    ):
        logprobs_T = padded_logprobs(policy, left, right, pad_id, neighbours)
        torch.testing.assert_close(logprobs_T, expected_T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_positions_counted_over_columns_instead_of_tokens_would_be_noticed():
    policy = tiny_policy("gpt2")
    tokens_BS, attention_BS = pad_left([PROMPT + RESPONSE, [9] * 20], 0)
    wrong_SD = policy.trunk(input_ids=tokens_BS, attention_mask=attention_BS.long()).last_hidden_state[0]
    right_SD = policy.hidden_states(tokens_BS, attention_BS)[0]
    assert (wrong_SD - right_SD)[-len(RESPONSE) :].abs().max() > 0.01


# Opening


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_saving_and_opening_bit_by_bit(family, tmp_path):
    policy = open_policy(save(tmp_path / "a", family), CPU)
    policy.save(tmp_path / "b")
    again = open_policy(tmp_path / "b", CPU)
    assert torch.equal(logprobs_and_entropies(policy)[0], logprobs_and_entropies(again)[0])
    assert not list((tmp_path / "b").glob("*.bin"))


def test_random_weights_come_from_the_config_and_the_global_seed(tmp_path):
    folder = save(tmp_path)
    opened = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        opened.append(logprobs_and_entropies(open_policy(folder, CPU, weights="random"))[0])
    assert torch.equal(opened[0], opened[1])
    assert not torch.equal(opened[0], opened[2])


def test_a_family_with_another_transformation_behind_its_head_is_refused():
    class Stretched(LlamaForCausalLM):
        def forward(self, **inputs):
            out = super().forward(**inputs)
            out.logits = out.logits * 1.5
            return out

    with pytest.raises(InputError, match="Stretched transforms its logits"):
        check_head(Policy(Stretched(tiny_config("llama")).eval(), TOKENIZER))


@pytest.mark.parametrize(("family", "setting"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_a_cap_or_a_scale_that_is_left_out_would_be_noticed(family, setting, monkeypatch):
    policy = tiny_policy(family)
    check_head(policy)
    theirs = policy.model(input_ids=one_row(range(8))[0])
    monkeypatch.setattr(policy.model.config, setting, None)
    monkeypatch.setattr(policy.model, "forward", lambda **_: theirs)
    with pytest.raises(InputError, match="transforms its logits"):
        check_head(replace(policy))  # a policy asks its config once


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        with pytest.raises(InputError, match="nowhere is no folder"):
            open_policy(path, CPU)


def test_of_a_run_and_of_its_checkpoint_the_model_is_named(tmp_path):
    checkpoint = Checkpointer(tmp_path).save(5, {"policy": save}, {})
    for path in (tmp_path, checkpoint):
        said = f"model.path = {path} is a run or a checkpoint of one: name its model, {checkpoint / 'policy'}"
        with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
            open_policy(path, CPU)
    assert open_policy(checkpoint / "policy", CPU)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "llama"])
def test_a_folder_without_a_tokenizer_is_refused_also_where_transformers_makes_an_empty_one(family, tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        open_policy(save(tmp_path, family, tokenizer=None), CPU)


def test_folders_without_weights_or_with_another_kind_of_model_are_refused(tmp_path):
    save(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    small = {"vocab_size": 264, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "b")
    (tmp_path / "c").mkdir()
    for name in "abc":
        with pytest.raises(InputError, match="cannot be loaded as a causal language model") as caught:
            open_policy(tmp_path / name, CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["enable_thinkng", "tokenize", "add_generation_prompt", "messages"])
def test_a_template_is_told_nothing_that_it_does_not_read_or_that_rendering_sets(name, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{# tokenize #}{% if enable_thinking %}{{ tools }}{% endif %}"
    folder = save(tmp_path, tokenizer=tokenizer)
    assert open_policy(folder, CPU, template={"enable_thinking": False, "tools": []}).template["tools"] == []
    with pytest.raises(InputError, match=rf"model.template.{name} = 'x': the chat template of .* reads no {name} that"):
        open_policy(folder, CPU, template={name: "x"})


def test_a_model_without_any_end_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    config = tiny_config("llama")
    config.eos_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end token"):
        open_policy(tmp_path, CPU)


def test_end_ids_are_the_tokenizers_and_the_generation_configs_and_a_missing_pad_id_is_one_of_them():
    policy = tiny_policy()
    policy.model.generation_config.eos_token_id = [7, 1]
    assert policy.end_ids == {1, 7}
    assert policy.pad_id == 0
    policy.tokenizer.pad_token = None
    assert policy.pad_id == 1


def test_a_gpu_that_is_not_there_is_an_input_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(InputError, match="device = cuda:1"):
        choose_device("cuda:1")
