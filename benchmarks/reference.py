"""The model, prompts and reward that every benchmark of a step shares.

The reference size is a Qwen3 of 616,576 parameters (hidden 128, 4 layers, vocabulary 99); prompts have 16 tokens, and
every completion has 32: the end token, id 99, is one that the model has no logit for. The reward is the parity of the
completion's token ids, so that both outcomes are frequent and judging costs nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dvpo import Trainer, load_config
from dvpo.tasks import Environment, Example, Reward, SingleTurn

LETTERS = [chr(code) for code in range(32, 127)]
SPECIAL_TOKENS = ["<pad>", "<a>", "<b>", "<c>", "<end>"]
VOCABULARY = len(LETTERS) + len(SPECIAL_TOKENS) - 1
PROMPT, COMPLETION, GROUPS, GROUP = 16, 32, 8, 8


def write_model(folder: Path, hidden: int = 128, layers: int = 4, vocabulary: int = VOCABULARY) -> Path:
    """Save a random model of that size, the intermediate layer twice as wide, and its tokenizer of letters.

    Tokens that a larger `vocabulary` has besides the letters are sampled like others and have no text.
    """
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=len(LETTERS),
        eos_token_id=vocabulary,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, end: int = VOCABULARY) -> None:
    """Letters and special tokens; the last of them, which ends a response, has the id `end`."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *SPECIAL_TOKENS])} | {SPECIAL_TOKENS[-1]: end}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = Split("", "isolated"), Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[-1],
        extra_special_tokens=SPECIAL_TOKENS[1:-1],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)


def prompts(count: int = 1024) -> list[str]:
    letters = torch.randint(1, 64, (count, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    return ["".join(LETTERS[i] for i in row) for row in letters]


class Parity:
    """Right is a completion whose token ids add up to an even number."""

    name = "parity"

    def split(self, name: str) -> Sequence[Example]:
        return [Example(text, text) for text in prompts()] if name == "train" else []

    def environment(self, example: Example) -> Environment:
        return SingleTurn(example)

    def true_reward(
        self, prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[Reward]:
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def make_trainer(algorithm: str, model: Path, output: Path, *overrides: str) -> Trainer:
    """A run at the reference size: 8 prompts x 8 samples a step, M = 200 where there are quantiles, one device.

    One optimiser step on the whole batch unless `overrides` say otherwise.
    """
    config = load_config(
        None,
        [
            f"algorithm={algorithm}",
            f"model.path={model}",
            f"output={output}",
            "device=cpu",
            "steps=1000000",
            f"sampling.prompts_per_step={GROUPS}",
            f"sampling.samples_per_prompt={GROUP}",
            f"sampling.max_completion_length={COMPLETION}",
            "critic.num_quantiles=200",
            "update.epochs=1",
            "update.minibatches=1",
            "checkpoint.every=0",
            *overrides,
        ],
    )
    return Trainer(config, task=Parity())
