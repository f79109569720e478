import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from dvpo.embedded import SPECIAL_TOKENS, make_config, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+2="},
    {"role": "assistant", "content": "#3"},
    {"role": "tool", "content": "ok"},
]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_encoded_byte_by_byte_and_decoded_to_itself(text):
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids) == text
    assume(not any(special in text for special in SPECIAL_TOKENS))
    assert len(ids) == len(text.encode())


@pytest.mark.parametrize("text", ["a  b", " , n't", "\r\n\t", "don 't ?"])
def test_decoding_does_not_tidy_up_spaces(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_each_special_token_is_one_token_of_its_own_and_pad_is_not_end():
    ids = [TOKENIZER(token).input_ids for token in SPECIAL_TOKENS]
    assert ids == [[i] for i in range(8)]
    assert TOKENIZER.pad_token_id == 0
    assert TOKENIZER.eos_token_id == 1
    assert TOKENIZER.decode([2, TOKENIZER.eos_token_id], skip_special_tokens=True) == ""


def test_chat_template_ends_every_turn_and_opens_the_assistants():
    text = TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == ("<|system|>Add.<|end|><|user|>1+2=<|end|><|assistant|>#3<|end|><|tool|>ok<|end|><|assistant|>")


def test_what_the_model_sees_when_sampling_is_a_prefix_of_what_it_saw_in_the_warm_start():
    prompt = TOKENIZER.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    whole = TOKENIZER.apply_chat_template(CHAT[:3], return_dict=False)
    assert whole == prompt + TOKENIZER("#3<|end|>").input_ids


def test_a_saved_tokenizer_is_loaded_by_auto_tokenizer_with_everything_it_needs(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    assert loaded.padding_side == "left"
    text = "<|user|>1 +  2 é\n<|end|>"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.apply_chat_template(CHAT, tokenize=False) == TOKENIZER.apply_chat_template(CHAT, tokenize=False)


def test_the_model_is_a_qwen3_of_the_promised_size_and_survives_saving(tmp_path):
    model = make_model()
    assert 30_000 <= model.num_parameters() <= 250_000
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 2**20
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen3ForCausalLM)
    ids = torch.tensor([TOKENIZER("1+2=").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_weights_depend_on_the_seed_alone_and_global_randomness_is_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (make_model(seed=seed).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_smaller_model_can_be_made():
    assert make_model(make_config(hidden_size=32, num_hidden_layers=2, intermediate_size=64)).num_parameters() < 40_000
