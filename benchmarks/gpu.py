"""One command for a machine with a GPU: are the kernels right, what do they reach, what does a training step take?

    python benchmarks/gpu.py             # some ten minutes on one GPU; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --smoke     # the same on the CPU with tiny sizes: it shows that the program runs

Kernels: the critic's loss, its gradient, and the targets of distributional GAE, on the GPU against float64 on the CPU
(the pairwise form and the plain loop that the tests use); then their time, and which share of the GPU's own copying
bandwidth they reach with the bytes that must pass, each read or written once.

Model: random, in the shape of Qwen3-0.6B, bfloat16, three heads of 200 quantiles. Sampling alone, then training steps
of dvpo and ppo in turns, each in a process of its own: seconds of a step and of its parts, and peak memory. Every
response is as long as it may be, since no token ends it.

Ends with exit code 1 if a kernel is wrong.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import LETTERS, Parity, write_tokenizer
from torch import Tensor
from transformers import Qwen3Config

from dvpo import Trainer, load_config
from dvpo.core.quantiles import quantile_levels
from dvpo.core.returns import distributional_gae, distributional_targets
from dvpo.core.risk import critic_terms
from dvpo.policy import open_policy
from dvpo.provenance import machine, source, versions
from dvpo.sampling import HuggingFaceSampler
from dvpo.settings import SamplingConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "core"))
from naive import looped_gae, naive_critic_terms  # noqa: E402

RIGHT = 2e-4
"""How far a kernel's results may lie from float64, as a share of the largest."""
GAMMA, LAM = 1.0, 0.95


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    tokens: int = 16_384
    """Of the loss."""
    quantiles: int = 200
    sequences: int = 64
    length: int = 4_096
    """Of GAE."""
    model: tuple[tuple[str, int], ...] = (
        ("hidden_size", 1024),
        ("num_hidden_layers", 28),
        ("intermediate_size", 3072),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 8),
        ("head_dim", 128),
        ("vocab_size", 151_936),
    )
    prompts: int = 8
    samples: int = 8
    completion: int = 512
    microbatch: int = 8
    steps: int = 3
    """Timed ones of each process, after one untimed."""
    rounds: int = 2
    """Processes of each algorithm."""
    repeats: int = 20
    """Timed runs of a kernel, after three untimed."""


SMOKE = Sizes(
    tokens=64,
    quantiles=16,
    sequences=2,
    length=32,
    model=(
        ("hidden_size", 32),
        ("num_hidden_layers", 2),
        ("intermediate_size", 64),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
        ("vocab_size", 128),
    ),
    prompts=2,
    samples=2,
    completion=8,
    microbatch=2,
    steps=1,
    rounds=1,
    repeats=2,
)


def main() -> int:
    options = parse()
    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no GPU; --smoke tries the program on the CPU", file=sys.stderr)
        return 2
    sizes, device = (SMOKE, "cpu") if options.smoke else (Sizes(), "cuda")
    if options.run_of:
        print(json.dumps(training(options.run_of, options.model, sizes, device)))
        return 0
    errors = {"critic terms": terms_error(sizes, device), "targets": targets_error(sizes, device)}
    result: dict[str, Any] = {"smoke": options.smoke, "errors": errors, "kernels": kernels(sizes, device)}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), sizes)
        result["sampling"] = sampling(model, sizes, device)
        result["training"] = contest(model, sizes, device, options.smoke)
    here = source()
    result |= {"sizes": vars(sizes), "machine": machine(device), "versions": versions()}
    result |= {"commit": here.commit, "dirty": here.dirty}
    show(result)
    output = options.output or (None if options.smoke else HERE / "results" / "gpu.json")
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(error <= RIGHT for error in errors.values()) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json; with --smoke: none")
    parser.add_argument("--run-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# Kernels


def loss_inputs(tokens: int, quantiles: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 3, quantiles, generator=draw), torch.randn(tokens, quantiles, generator=draw)


def all_terms(function: Callable[..., dict[str, Tensor]], theta_KNM: Tensor, atoms_KL: Tensor) -> list[Tensor]:
    """The eight terms and the gradient of their sum."""
    theta_KNM = theta_KNM.detach().requires_grad_()
    levels_M = quantile_levels(theta_KNM.shape[-1]).to(theta_KNM)
    terms_8K = torch.stack(list(function(theta_KNM, atoms_KL, levels_M, 0.1, 2.0, 0.1, 0.1).values()))
    terms_8K.sum().backward()
    assert theta_KNM.grad is not None
    return [*terms_8K.detach(), theta_KNM.grad]


def terms_error(sizes: Sizes, device: str) -> float:
    """Of 64 tokens: the pairwise form in float64 is large."""
    theta_KNM, atoms_KL = loss_inputs(64, sizes.quantiles)
    here = all_terms(critic_terms, theta_KNM.to(device), atoms_KL.to(device))
    return farthest(here, all_terms(naive_critic_terms, theta_KNM.double(), atoms_KL.double()))


def gae_inputs(sequences: int, length: int, quantiles: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask_BT = torch.rand(sequences, length, generator=draw) < 0.9
    rewards_BT = torch.randn(sequences, length, generator=draw) * mask_BT
    return rewards_BT, torch.randn(sequences, length, quantiles, generator=draw), mask_BT


def targets_error(sizes: Sizes, device: str) -> float:
    rewards, quantiles, mask = gae_inputs(2, 64, sizes.quantiles)
    here = distributional_gae(rewards.to(device), quantiles.to(device), mask.to(device), GAMMA, LAM)
    return farthest(here, looped_gae(rewards.double(), quantiles.double(), mask, GAMMA, LAM))


def farthest(results: Any, expected: Any) -> float:
    """The largest deviation, as a share of the largest number of the tensor that it is in."""
    gaps = [
        float((one.cpu().double() - other).abs().max() / other.abs().max().clamp(min=1e-12))
        for one, other in zip(results, expected, strict=True)
    ]
    return max(gaps)


def kernels(sizes: Sizes, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds, and the share of the copying bandwidth that the least possible traffic of that time makes."""
    theta_KNM, atoms_KL = (tensor.to(device) for tensor in loss_inputs(sizes.tokens, sizes.quantiles))
    given = [tensor.to(device) for tensor in gae_inputs(sizes.sequences, sizes.length, sizes.quantiles)]
    copied = torch.empty_like(given[1])
    copy = seconds(lambda: copied.copy_(given[1]), device, sizes.repeats)
    bandwidth = 2 * copied.nbytes / copy
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "critic terms, forward and backward": (
            lambda: all_terms(critic_terms, theta_KNM, atoms_KL),
            2 * theta_KNM.nbytes + atoms_KL.nbytes,  # predictions and atoms in, gradient out
        ),
        "distributional targets": (lambda: distributional_targets(*given, GAMMA, LAM), 2 * given[1].nbytes),
    }
    rows = {"copy": {"ms": 1e3 * copy, "gigabytes_per_second": bandwidth / 1e9}}
    for name, (run, least) in cases.items():
        spent = seconds(run, device, sizes.repeats)
        rows[name] = {"ms": 1e3 * spent, "share_of_copy_bandwidth": least / spent / bandwidth}
    return rows


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median of the runs, each waited for."""
    spent = []
    for number in range(3 + repeats):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        if number >= 3:
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Model


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A config without weights: every process draws them. No token ends a response: the end's id has no logit."""
    shape = dict(sizes.model)
    config = Qwen3Config(
        **shape,
        max_position_embeddings=4_096,
        tie_word_embeddings=True,
        pad_token_id=len(LETTERS),
        eos_token_id=shape["vocab_size"],
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    write_tokenizer(folder, end=shape["vocab_size"])
    return folder


def sampling(model: Path, sizes: Sizes, device: str) -> dict[str, float]:
    """By transformers: every sequence side by side."""
    torch.manual_seed(0)
    policy = open_policy(model, torch.device(device), "bfloat16" if device == "cuda" else "float32", weights="random")
    sampler = HuggingFaceSampler(policy, SamplingConfig(batch_size=sizes.prompts * sizes.samples))
    rows = sizes.prompts * sizes.samples
    contexts = [[5 + i // sizes.samples] * 64 for i in range(rows)]
    spent = seconds(
        lambda: sampler.sample(contexts, [sizes.completion] * rows, range(rows)), device, max(1, sizes.repeats // 10)
    )
    return {"sequences": rows, "tokens": sizes.completion, "tokens_per_second": rows * sizes.completion / spent}


def training(algorithm: str, model: Path, sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds of the steps of one run, and the peak of its memory on the GPU."""
    config = load_config(
        None,
        [
            f"algorithm={algorithm}",
            f"model.path={model}",
            "model.weights=random",
            f"model.dtype={'bfloat16' if device == 'cuda' else 'float32'}",
            f"output={tempfile.mkdtemp(dir=model)}/run",
            f"device={device}",
            "steps=1000000",
            f"sampling.prompts_per_step={sizes.prompts}",
            f"sampling.samples_per_prompt={sizes.samples}",
            f"sampling.max_completion_length={sizes.completion}",
            f"critic.num_quantiles={sizes.quantiles}",
            f"update.microbatch_size={sizes.microbatch}",
            "checkpoint.every=0",
        ],
    )
    trainer = Trainer(config, task=Parity())
    try:
        steps = [trainer.train_step() for _ in range(1 + sizes.steps)][1:]
    finally:
        trainer.close()
    times = ("time/step", "time/sample", "time/update")
    return {
        **{name: [step[name] for step in steps] for name in times},
        "tokens": steps[-1]["rollout/tokens"],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def contest(model: Path, sizes: Sizes, device: str, smoke: bool) -> dict[str, Any]:
    """dvpo and ppo in turns, each turn a process; the smoke test spares itself the processes."""
    runs: dict[str, list[dict[str, Any]]] = {"dvpo": [], "ppo": []}
    for _ in range(sizes.rounds):
        for name, turns in runs.items():
            if smoke:
                turns.append(training(name, model, sizes, device))
                continue
            command = [sys.executable, __file__, "--run-of", name, "--model", str(model)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            turns.append(json.loads(said.splitlines()[-1]))
    summary: dict[str, Any] = {}
    for name, turns in runs.items():
        times = {part: statistics.median(s for turn in turns for s in turn[part]) for part in turns[0] if "/" in part}
        summary[name] = {**times, "tokens": turns[0]["tokens"], "peak_bytes": turns[0]["peak_bytes"], "runs": turns}
    peaks = [summary[name]["peak_bytes"] for name in ("dvpo", "ppo")]
    return {
        **summary,
        "step_dvpo_over_ppo": summary["dvpo"]["time/step"] / summary["ppo"]["time/step"],
        "peak_dvpo_over_ppo": peaks[0] / peaks[1] if None not in peaks else None,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']['gpu'] or result['machine']['cpu']}{', smoke test' if result['smoke'] else ''}")
    for name, error in result["errors"].items():
        print(f"{name:36} {'right' if error <= RIGHT else 'WRONG'}: {error:.1e} from float64")
    for name, row in result["kernels"].items():
        rest = [f"{key.replace('_', ' ')} {value:.3g}" for key, value in row.items() if key != "ms"]
        print(f"{name:36} {row['ms']:.3f} ms, {', '.join(rest)}")
    print(f"{'sampling':36} {result['sampling']['tokens_per_second']:,.0f} tokens a second")
    training = result["training"]
    for name in ("dvpo", "ppo"):
        row = training[name]
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
        parts = f"sampling {row['time/sample']:.3f}, update {row['time/update']:.3f}"
        print(f"{name + ', one step':36} {row['time/step']:.3f} s ({parts}){peak}")
    print(f"{'dvpo / ppo':36} step {training['step_dvpo_over_ppo']:.3f}, peak {training['peak_dvpo_over_ppo'] or '-'}")


if __name__ == "__main__":
    sys.exit(main())
