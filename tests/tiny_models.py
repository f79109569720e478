"""Tiny random models of several families and the embedded tokenizer: made here, never downloaded."""

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dvpo.embedded import BAD, CHAT_TEMPLATE, END, PAD, ROLES, SPECIAL_TOKENS, make_tokenizer
from dvpo.policy import Policy, without_dropout

PAD_ID, END_ID = 0, 1
TOKENIZER = make_tokenizer()
FAMILIES = ("qwen3", "llama", "gpt2", "gemma2", "cohere", "granite")


def tiny_config(family: str, vocabulary: int = 264) -> PretrainedConfig:
    """A config with what is special about the family: dropout, learnt positions, a cap or a scale behind the head."""
    ids = {"vocab_size": vocabulary, "pad_token_id": PAD_ID, "bos_token_id": None, "eos_token_id": END_ID}
    if family == "gpt2":
        dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
        return GPT2Config(**ids, **dropouts, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    if family == "lfm2":
        return Lfm2Config(**ids, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3,
                          layer_types=["conv", "full_attention"])  # fmt: skip
    kinds = {
        "qwen3": (Qwen3Config, {"head_dim": 8}),
        "llama": (LlamaConfig, {"attention_dropout": 0.1}),
        "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8}),
        "cohere": (CohereConfig, {"logit_scale": 0.5}),
        "granite": (GraniteConfig, {"logits_scaling": 0.5}),
    }
    kind, special = kinds[family]
    return kind(
        **ids,
        **special,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
    )


def tiny_policy(family: str = "qwen3", vocabulary: int = 264, seed: int = 0, kind: type[Policy] = Policy) -> Policy:
    """A policy with random weights, as `open_policy` would make it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(without_dropout(tiny_config(family, vocabulary)))
    return kind(model.eval(), make_tokenizer())


class AsciiPolicy(Policy):
    """Writes printable ASCII and the end token only, so that a response has a text."""

    def logits(self, hidden_KD: Tensor) -> Tensor:
        logits_KV = super().logits(hidden_KD)
        writable = torch.tensor([END_ID, *self.tokenizer("abcdefgh +=12").input_ids])
        return logits_KV.index_fill(1, torch.tensor(sorted(set(range(264)) - set(writable.tolist()))), -1e9)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded tokenizer with two merges, `>` + newline and `1` + `2`: ids 264 and 265."""
    symbols = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), ">Ċ", "12"]
    merges = [(">", "Ċ"), ("1", "2")]
    backend = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def with_begin_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, putting `<|bad|>` before every text, as Llama's does with its begin token."""
    tokenizer.bos_token = BAD
    first = [(BAD, tokenizer.convert_tokens_to_ids(BAD))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BAD} $A", special_tokens=first)
    return tokenizer


def one_row(tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens and attention of a row without padding."""
    tokens_BS = torch.tensor([list(tokens)])
    return tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool)


def response_logprobs(
    policy: Policy, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probs of a response by transformers' own forward of the row by itself: the reference."""
    tokens_BS, _ = one_row([*prompt, *response])
    logits_SV = policy.model(input_ids=tokens_BS, use_cache=False).logits[0].float() / temperature
    state_columns = slice(len(prompt) - 1, -1)
    return logits_SV.log_softmax(-1)[state_columns].gather(-1, torch.tensor(list(response))[:, None])[:, 0]
