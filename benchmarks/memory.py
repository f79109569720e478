"""Peak memory of a training step on a CPU: DVPO against PPO, and what `dvpo doctor` predicts against what is measured.

    python benchmarks/memory.py                  # every size, each run in a process of its own
    python benchmarks/memory.py --only small     # one of them
    python benchmarks/memory.py --lora           # instead DVPO with a KL penalty, all parameters against adapters
    python benchmarks/memory.py --bfloat16       # instead DVPO in bfloat16, activations kept against computed again
    python benchmarks/memory.py --laws           # instead DVPO with many laws, recentred against not
    python benchmarks/memory.py --sampling       # instead the sampler alone, float32 against bfloat16

A run makes one training step of a random Qwen3, in float32 unless said, with moments of AdamW in place. Responses are
scripted, random tokens of full length, so that what counts is the update; the sampler is measured by itself. Peak
memory is the process's largest resident set; the base is what it held before a model was made.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dvpo import Trainer, load_config
from dvpo.config import Config
from dvpo.embedded import make_tokenizer
from dvpo.memory import count_weights, predict
from dvpo.policy import open_policy
from dvpo.provenance import machine, source, versions
from dvpo.sampling import HuggingFaceSampler, Turn
from dvpo.tasks import Environment, Example, Reward, SingleTurn

RESULTS = Path(__file__).parent / "results"
ALLOWED_SHARE = 0.03
"""DVPO's step may hold so much more than PPO's."""
ALLOWED_ERROR = 0.2
"""A prediction may be off by so much."""


class Size(NamedTuple):
    hidden: int
    layers: int
    vocabulary: int
    prompt: int
    completion: int
    responses: int
    microbatch: int
    quantiles: int


SIZES = {
    "small": Size(256, 4, 4096, 64, 192, 8, 8, 50),
    "middle": Size(512, 6, 16384, 256, 256, 2, 2, 200),
    "large": Size(1024, 8, 32768, 32, 2016, 1, 1, 200),
    "many_laws": Size(128, 1, 512, 16, 1024, 64, 1, 200),
    "few_long": Size(512, 6, 16384, 256, 1024, 8, 8, 1),
    "many_short": Size(512, 6, 16384, 128, 128, 128, 8, 1),
}
KL = ["algorithm=dvpo", "actor.kl.coef=0.01"]
RUNS = {
    "ppo": ["algorithm=ppo"],
    "dvpo": ["algorithm=dvpo"],
    "dvpo_kl": KL,
    "dvpo_kl_lora": [*KL, "model.lora.rank=16"],
    "dvpo_bf16": ["algorithm=dvpo", "model.dtype=bfloat16"],
    "dvpo_bf16_recomputed": ["algorithm=dvpo", "model.dtype=bfloat16", "model.gradient_checkpointing=true"],
    "dvpo_recentred": ["algorithm=dvpo", "advantage.recentre=true"],
    "sampling": ["algorithm=reinforce_pp"],
    "sampling_bf16": ["algorithm=reinforce_pp", "model.dtype=bfloat16"],
}


class Comparison(NamedTuple):
    """Two runs at several sizes; the second takes more."""

    what: str
    less: str
    more: str
    sizes: tuple[str, ...]
    above: str
    """What the results file calls the share that the second takes above the first."""


STEPS = ("small", "middle", "large")
COMPARISONS = {
    "memory": Comparison("DVPO against PPO", "ppo", "dvpo", STEPS, "dvpo_above_ppo"),
    "memory_lora": Comparison(
        "with a KL penalty, all parameters against adapters", "dvpo_kl_lora", "dvpo_kl", STEPS, "full_above_lora"
    ),
    "memory_bfloat16": Comparison(
        "activations kept against computed again", "dvpo_bf16_recomputed", "dvpo_bf16", STEPS, "kept_above_recomputed"
    ),
    "memory_laws": Comparison(
        "many laws, recentred against as predicted", "dvpo", "dvpo_recentred", ("many_laws",), "recentred_above"
    ),
    "memory_sampling": Comparison(
        "the sampler alone", "sampling_bf16", "sampling", ("few_long", "many_short"), "float32_above_bfloat16"
    ),
}


class Anything:
    """Random prompts of one length; whatever is answered is worth 0 or 1."""

    name = "anything"

    def __init__(self, length: int) -> None:
        self.length = length

    def split(self, name: str) -> Sequence[Example]:
        return [Example(str(i), chr(97 + i) * self.length) for i in range(8)] if name == "train" else []

    def environment(self, example: Example) -> Environment:
        return SingleTurn(example)

    def true_reward(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Reward]:
        return [float(sum(ids) % 2) for ids in completion_ids]


def write_model(folder: Path, size: Size) -> Path:
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=3 * size.hidden,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def scripted(self: HuggingFaceSampler, contexts: Any, budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
    logprob = -math.log(self.policy.vocabulary)
    tokens = [torch.randint(8, 264, (n,), generator=torch.Generator().manual_seed(s)).tolist()
              for n, s in zip(budgets, seeds, strict=True)]  # fmt: skip
    return [Turn(drawn, [logprob] * len(drawn), finished=False) for drawn in tokens]


def measure(name: str, run: str, model: Path) -> dict[str, Any]:
    """In this process: one step, its peak, and what was predicted before the model was opened."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            None,
            [
                *RUNS[run],
                f"model.path={model}",
                f"output={folder}/run",
                "device=cpu",
                f"sampling.prompts_per_step={size.responses}",
                "sampling.samples_per_prompt=1",
                f"evaluation.prompts={size.responses}",
                f"sampling.max_prompt_length={size.prompt}",
                f"sampling.max_completion_length={size.completion}",
                f"update.microbatch_size={size.microbatch}",
                "update.minibatches=1",
                "advantage.truncation=terminal",
                *(["critic.num_quantiles=" + str(size.quantiles)] if run != "ppo" else []),
            ],
        )
        base = peak()
        shape = Qwen3Config.from_pretrained(model)
        predicted = predict(config, shape, base)
        if run.startswith("sampling"):
            expected = base + predicted.weights + predicted.sampling
            draw(config, size)
        else:
            expected = base + predicted.weights + predicted.moments + predicted.update
            step(config, size)
    return {
        "algorithm": run,
        "parameters": count_weights(shape).model.number,
        **size._asdict(),
        "base": base,
        "measured": peak(),
        "predicted": expected,
    }


def step(config: Config, size: Size) -> None:
    HuggingFaceSampler.sample = scripted  # type: ignore[method-assign]
    trainer = Trainer(config, task=Anything(size.prompt))
    for optimiser in (trainer.policy_optimiser, trainer.critic_optimiser):
        assert optimiser is not None
        for parameter in optimiser.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.adamw.step()
        optimiser.adamw.zero_grad(set_to_none=True)
    trainer.train_step()
    trainer.close()


def draw(config: Config, size: Size) -> None:
    policy = open_policy(config.model.path, torch.device("cpu"), config.model.dtype)
    prompts = torch.randint(8, 264, (size.responses, size.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    budgets = [size.completion] * size.responses
    HuggingFaceSampler(policy, config.sampling).sample(prompts, budgets, list(range(size.responses)))


def peak() -> int:
    """Largest resident set of this program: getrusage would count what its parent held as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    which = parser.add_mutually_exclusive_group()
    for name, other in COMPARISONS.items():
        if name != "memory":
            flag = f"--{name.removeprefix('memory_')}"
            which.add_argument(flag, dest="name", action="store_const", const=name, help=other.what)
    parser.add_argument("--output", type=Path, help="the results file")
    arguments = parser.parse_args()
    if arguments.measure:
        name, run, model = arguments.measure
        print(json.dumps(measure(name, run, Path(model))))
        return 0
    part = arguments.name or "memory"
    compared = COMPARISONS[part]
    output = arguments.output or RESULTS / f"{part}.json"
    runs = []
    for size in [arguments.only] if arguments.only else compared.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder), SIZES[size])
            for run in (compared.less, compared.more):
                command = [sys.executable, __file__, "--measure", size, run, str(model)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs.append({"size": size, **json.loads(said.splitlines()[-1])})
                print(runs[-1], flush=True)
    errors = {f"{run['size']} {run['algorithm']}": run["predicted"] / run["measured"] - 1 for run in runs}
    pairs = zip(runs[::2], runs[1::2], strict=True)
    shares = {more["size"]: more["measured"] / less["measured"] - 1 for less, more in pairs}
    result = {
        "commit": source().commit,
        "dirty": source().dirty,
        "machine": machine("cpu"),
        "versions": versions(),
        "runs": runs,
        compared.above: shares,
        "prediction_error": errors,
        "gpu": "not measured",
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    in_bounds = part != "memory" or shares.get("large", 0.0) <= ALLOWED_SHARE
    kept = in_bounds and all(abs(e) <= ALLOWED_ERROR for e in errors.values())
    print("within the bounds" if kept else "NOT within the bounds", shares, errors)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
