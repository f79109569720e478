"""Your own prompts, model and reward function: ten lines, at the bottom. What stands above them only makes stand-ins.

    python examples/bring_your_own_reward.py [FOLDER]

The stand-ins need no download: three prompts as chat messages, and a random Llama with a word-level tokenizer and a
chat template of its own. Put your file and your model folder in their place.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dvpo import Trainer, load_config

ANSWERS = {"colour": ["red", "green", "blue"], "fruit": ["apple", "pear", "plum"], "town": ["rome", "oslo"]}
SPECIAL = ["[unk]", "[end]", "[user]", "[assistant]"]
WORDS = [*SPECIAL, "name", "a", "please", *ANSWERS, *(word for words in ANSWERS.values() for word in words)]
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_model(folder: Path) -> None:
    """A random Llama of two layers that knows these words and no others."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[unk]", eos_token="[end]", chat_template=TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["[user]", "[assistant]"]})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(file: Path) -> None:
    """One JSON object a line: `prompt`, and whatever columns the reward function wants."""
    rows = [
        {"prompt": [{"role": "user", "content": f"name a {kind} please"}], "answers": words}
        for kind, words in ANSWERS.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def share_of_right_words(prompts, completions, completion_ids, answers, **columns):  # type: ignore[no-untyped-def]
    """TRL's signature. For a chat prompt each completion is a list of messages; None would mean "no opinion"."""
    scores = []
    for completion, right in zip(completions, answers, strict=True):
        words = completion[0]["content"].split()
        scores.append(sum(word in right for word in words) / len(words) if words else None)
    return scores


def main(folder: Path) -> None:
    make_model(folder / "model")
    write_prompts(folder / "prompts.jsonl")

    config = load_config({
        "output": f"{folder}/run",
        "steps": 2,
        "model": {"path": f"{folder}/model"},
        "task": {"name": "files", "path": f"{folder}/prompts.jsonl"},
        "sampling": {"prompts_per_step": 2, "samples_per_prompt": 4, "max_prompt_length": 16,
                     "max_completion_length": 8},
    })  # fmt: skip
    Trainer(config, reward=share_of_right_words).train()
    print(f"run folder: {config.output}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
