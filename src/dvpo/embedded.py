"""The embedded model: a real fast tokenizer with a chat template and a real, but tiny, Qwen3.

Nothing here is a stand-in. The tokenizer is a `PreTrainedTokenizerFast` over the 256 byte symbols, without
merges, so that every text round-trips; the model is `transformers`' own Qwen3 with small numbers in its
config. What runs on them runs unchanged on Qwen3-8B.
"""

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
GOOD, BAD = "<|good|>", "<|bad|>"
"""The two verdicts: the difference of their logits is the model's log-odds of ending in a right answer."""

SPECIAL_TOKENS = (PAD, END, *ROLES, GOOD, BAD)

CONTEXT_LENGTH = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the byte-level tokenizer: 8 special tokens (pad is not end), then one token for each byte."""
    symbols = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[*ROLES, GOOD, BAD],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_config(hidden_size: int = 64, num_hidden_layers: int = 3, intermediate_size: int = 192) -> Qwen3Config:
    """Describe the tiny Qwen3: heads of 16, two queries to a key, tied embeddings, our own vocabulary.

    Args:
        hidden_size: width D, a multiple of 32.
        num_hidden_layers: number of blocks.
        intermediate_size: width of the gated feed-forward layer.
    """
    specials = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen3Config(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        head_dim=16,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.1,  # so narrow a model learns slowly from the usual 0.02
        pad_token_id=specials[PAD],
        eos_token_id=specials[END],
    )


def make_model(config: Qwen3Config | None = None, seed: int = 0) -> Qwen3ForCausalLM:
    """Make a float32 Qwen3 with random weights that depend on `seed` alone, without touching global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config or make_config()).to(torch.float32)
