"""The grid: 1, 2 and 4 processes, both strategies, any micro-batch, every kind of critic; resumes; the command line."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dvpo.checkpoint import latest_checkpoint
from dvpo.config import to_yaml
from dvpo.trainer import Trainer
from processes import SPEAKING, TORCHRUN, failing, launch
from runs import LINEAR, Parity, Talk, Unread, run_config, trained
from test_parallel import (
    FAULTY,
    STRATEGIES,
    assert_same_figures,
    assert_same_weights,
    final_weights,
    metrics_of,
    prompts_of_both_steps,
    seen_by,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

PLAIN = [*LINEAR, "steps=5", "sampling.prompts_per_step=4", "sampling.samples_per_prompt=3", "update.epochs=2"]
PLAIN += ["actor.kl.coef=0.05", "evaluation.every=2", "evaluation.samples=2", "log.tokens=3"]
ADAM = ["steps=5", "sampling.prompts_per_step=4", "policy_optimiser.lr=1e-4", "critic_optimiser.lr=1e-4"]
SHORT = [*LINEAR, "steps=2", "sampling.prompts_per_step=3", "sampling.samples_per_prompt=2", "update.minibatches=3"]
KINDS: dict[str, list[str]] = {
    "ppo": ["algorithm=ppo"],
    "grpo": ["algorithm=grpo"],
    "reinforce": ["algorithm=reinforce_pp", "actor.kl.coef=0.1", "actor.kl.place=reward"],
    "vocabulary": ["algorithm=cql_ppo"],
    "implicit": ["algorithm=dvpo_iqn"],
    "categorical": ["algorithm=ppo_hl_gauss"],
    "shared": ["critic.trunk=shared", "model.gradient_checkpointing=true"],
    "frozen": ["critic.trunk=frozen", "critic.features=true"],
    "mixture": ["advantage.target=mixture", "advantage.truncation=bootstrap", "model.gradient_checkpointing=true"],
    "verdict": ["critic.start=verdict", "critic.privileged=answer"],
    "normed": [
        "reward.norm=batch",
        "reward.trusted=1",
        "reward.correction=backward",
        "noise.kind=flip",
        "noise.rate=0.2",
    ],
    "lora": ["model.lora.rank=4", "actor.kl.coef=0.1", "model.gradient_checkpointing=true"],
    "lora_whole_critic": ["model.lora.rank=4", "critic.lora.rank=0", "critic.start=verdict"],
    "token_sum": ["actor.aggregation=seq_mean_token_mean", "advantage.truncation=mask"],
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process without torchrun does."""
    place = tmp_path_factory.mktemp("one")
    trained(place / "plain", *PLAIN)
    trained(place / "adam", *ADAM)
    trained(place / "talk", *SHORT, task=Talk())
    for name, overrides in KINDS.items():
        trained(place / name, *SHORT, *overrides)
    return place


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_figures_and_weights_do_not_depend_on_processes_strategy_or_micro_batch(
    tmp_path: Path, one: Path, processes: int
):
    runs: list[dict[str, Any]] = [
        {
            "output": str(tmp_path / f"{strategy}-{size}"),
            "overrides": [*PLAIN, f"distributed.strategy={strategy}", f"update.microbatch_size={size}"],
        }
        for strategy in STRATEGIES
        for size in (1, 2, 64)
    ]
    runs += [
        {"output": str(tmp_path / f"adam-{strategy}"), "overrides": [*ADAM, f"distributed.strategy={strategy}"]}
        for strategy in STRATEGIES
    ]
    for answers in launch(tmp_path / "answers", processes, runs, timeout=1000):
        assert seen_by(answers) == ([processes] * processes, list(range(processes)))
    for strategy in STRATEGIES:
        for size in (1, 2, 64):
            assert_same_figures(tmp_path / f"{strategy}-{size}", one / "plain")
            assert_same_weights(tmp_path / f"{strategy}-{size}", one / "plain", tolerance=1e-5)
        assert_same_figures(tmp_path / f"adam-{strategy}", one / "adam", relative=5e-3)


def test_every_kind_of_critic_and_loss_is_the_same_on_two_processes(tmp_path: Path, one: Path):
    runs = [
        {
            "output": str(tmp_path / f"{strategy}-{name}"),
            "overrides": [*SHORT, *KINDS.get(name, []), f"distributed.strategy={strategy}"],
            "task": "talk" if name == "talk" else "parity",
        }
        for strategy in STRATEGIES
        for name in (*KINDS, "talk")
    ]
    launch(tmp_path / "answers", 2, runs, timeout=1000)
    for strategy in STRATEGIES:
        for name in (*KINDS, "talk"):
            assert_same_figures(tmp_path / f"{strategy}-{name}", one / name)


def test_every_kind_goes_on_alike_where_one_process_or_both_have_no_reward_in_a_step(tmp_path: Path):
    prompts = prompts_of_both_steps()
    manners = {prompts[2]: "raises", prompts[3]: "abstains"} | dict.fromkeys(prompts[4:], "raises")
    kinds = {name: KINDS[name] for name in ("ppo", "grpo", "reinforce", "vocabulary", "implicit", "categorical")}
    kinds |= {"believed": ["advantage.missing_reward=bootstrap"], "replaced": ["sampling.resample_rounds=1"]}
    for name, overrides in kinds.items():
        trained(tmp_path / name, *FAULTY, *overrides, reward=failing(manners))
    runs = [
        {"output": str(tmp_path / f"{strategy}-{name}"), "overrides": [*FAULTY, *overrides, way], "failing": manners}
        for strategy in STRATEGIES
        for name, overrides in kinds.items()
        for way in (f"distributed.strategy={strategy}",)
    ]
    launch(tmp_path / "answers", 2, runs, timeout=1000)
    for strategy in STRATEGIES:
        for name in kinds:
            # A critic that believes itself has targets where it stands, and there its loss has kinks: rounding decides
            # on which side. One process with another micro-batch differs as much.
            relative = 0.05 if name == "believed" else 2e-4
            assert_same_figures(tmp_path / f"{strategy}-{name}", tmp_path / name, relative)
    missing = [row["reward/missing"] for row in metrics_of(tmp_path / "fsdp-grpo") if "reward/missing" in row]
    assert missing == [0.5, 1.0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_of_two_processes_goes_on_with_one_and_with_four_and_the_other_strategy(
    tmp_path: Path, one: Path, strategy: str
):
    other = STRATEGIES[1 - STRATEGIES.index(strategy)]
    names = ("to-1", "to-4", "to-1-other", "to-4-other")
    first = [*PLAIN, "steps=3", f"distributed.strategy={strategy}"]
    launch(tmp_path / "2", 2, [{"output": str(tmp_path / name), "overrides": first} for name in names], timeout=1000)
    for processes in (1, 4):
        runs = [
            {
                "output": str(tmp_path / name),
                "overrides": [*PLAIN, f"distributed.strategy={other if name.endswith('other') else strategy}"],
                "resume": True,
            }
            for name in names
            if f"to-{processes}" in name
        ]
        for answers in launch(tmp_path / str(processes), processes, runs, timeout=1000):
            assert seen_by(answers)[0] == [processes] * processes
    trained(tmp_path / "to-3", *PLAIN, "steps=3")
    trained(tmp_path / "to-3", *PLAIN, resume=True)  # an evaluation at step 3, as the others have
    for name in names:
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        assert checkpoint.name == "checkpoint-5"
        assert_same_figures(tmp_path / name, tmp_path / "to-3")
        assert_same_weights(tmp_path / name, one / "plain", tolerance=1e-5)


def test_shares_in_host_memory_change_nothing_and_shares_gathered_in_bfloat16_little(tmp_path: Path):
    # The same responses for all, or a rounded logit makes another token of one, and everything after it differs.
    plain = [*PLAIN, "sampling.correction.kind=truncated", "alarms.mismatch=0"]
    one = Trainer(run_config(tmp_path / "one", *plain), task=Parity())
    one.collector.sampler = Unread()
    one.train()
    ways = {
        "offload": ["distributed.cpu_offload=true"],
        "bfloat16": ["model.dtype=bfloat16"],
        "both": ["model.dtype=bfloat16", "distributed.cpu_offload=true", "model.gradient_checkpointing=true"],
    }
    runs: list[dict[str, Any]] = []
    for name, way in ways.items():
        overrides = [*plain, "distributed.strategy=fsdp", *way]
        runs += [
            {"output": str(tmp_path / name), "overrides": overrides, "unread": True},
            {"output": str(tmp_path / f"{name}-again"), "overrides": [*overrides, "steps=3"], "unread": True},
            {"output": str(tmp_path / f"{name}-again"), "overrides": overrides, "unread": True, "resume": True},
        ]
    answers = launch(tmp_path / "answers", 2, runs, timeout=1000)
    layers = ["torch.float32", "torch.bfloat16", "torch.bfloat16"]
    for said, used in zip(answers, [layer for layer in layers for _ in range(3)], strict=True):
        assert [a["used"] for a in said] == [{"layer": used, "critic's layer": used, "heads": "torch.float32"}] * 2

    assert_same_figures(tmp_path / "offload", tmp_path / "one")
    assert_same_weights(tmp_path / "offload", tmp_path / "one", tolerance=1e-5)
    assert_same_weights(tmp_path / "both", tmp_path / "bfloat16", tolerance=1e-5)
    ours, theirs = ([row for row in metrics_of(tmp_path / name) if "actor/loss" in row] for name in ("bfloat16", "one"))
    for own, other in zip(ours, theirs, strict=True):
        # The actor's gradient is of whitened advantages, in which rounding grows: .2% off in the first step, 2% to the
        # fourth, 5.2% in the fifth (on one process and other seeds up to 13%, whichever kernel attention takes).
        actor = 0.005 if own["step"] == 1 else 0.05 if own["step"] < 5 else 0.1
        for key, relative in (("critic/loss", 0.005), ("critic/grad_norm", 0.02), ("actor/grad_norm", actor)):
            assert 0 < abs(own[key] / other[key] - 1) < relative, (own["step"], key)
        assert own["actor/loss"] == pytest.approx(other["actor/loss"], abs=0.003)  # of whitened advantages: near 0
    for name in ways:
        assert_same_weights(tmp_path / f"{name}-again", tmp_path / name, tolerance=1e-6)
        assert {str(tensor.dtype) for tensor in final_weights(tmp_path / name).values()} == {"torch.float32"}
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        exported = AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
        assert exported.dtype is exported.config.dtype is torch.float32


def test_frozen_weights_in_bfloat16_may_be_sharded_beside_adapters_in_float32(tmp_path: Path):
    held = [*PLAIN, "sampling.correction.kind=truncated", "alarms.mismatch=0"]
    held += ["model.lora.rank=4", "model.dtype=bfloat16"]
    one = Trainer(run_config(tmp_path / "one", *held), task=Parity())
    one.collector.sampler = Unread()
    one.train()
    overrides = [*held, "distributed.strategy=fsdp"]
    launch(
        tmp_path / "2", 2, [{"output": str(tmp_path / "fsdp"), "overrides": overrides, "unread": True}], timeout=1000
    )
    ours, theirs = ([row for row in metrics_of(tmp_path / name) if "actor/loss" in row] for name in ("fsdp", "one"))
    for own, other in zip(ours, theirs, strict=True):
        assert own["critic/loss"] == pytest.approx(other["critic/loss"], rel=0.005)
        assert own["critic/grad_norm"] == pytest.approx(other["critic/grad_norm"], rel=0.02)
    assert {str(tensor.dtype) for tensor in final_weights(tmp_path / "fsdp").values()} == {"torch.float32"}


def test_adapters_of_two_processes_go_on_with_one_and_whole_ones_sharded(tmp_path: Path):
    lora = [*PLAIN, "model.lora.rank=4"]
    trained(tmp_path / "one", *lora)
    runs = [
        {"output": str(tmp_path / name), "overrides": [*lora, "steps=3", f"distributed.strategy={name}"]}
        for name in STRATEGIES
    ]
    launch(tmp_path / "2", 2, runs, timeout=1000)
    trained(tmp_path / "fsdp", *lora, resume=True)
    sharded = {"output": str(tmp_path / "ddp"), "overrides": [*lora, "distributed.strategy=fsdp"], "resume": True}
    launch(tmp_path / "sharded", 2, [sharded], timeout=1000)
    for name in STRATEGIES:
        assert_same_weights(tmp_path / name, tmp_path / "one", tolerance=1e-5)


def test_the_command_under_torchrun_trains_and_says_everything_once(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(to_yaml(run_config(tmp_path / "run", "task.name=math", "steps=2")))

    def said(*words: str) -> tuple[int, str]:
        command = [*TORCHRUN, "--nproc-per-node=2", "-m", "dvpo", *words]
        environment = {**os.environ, **SPEAKING}
        outcome = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, env=environment)
        return outcome.returncode, outcome.stdout + outcome.stderr

    code, text = said("train", str(tmp_path / "mine.yaml"), "distributed.strategy=fsdp")
    assert code == 0, text
    assert text.count("run folder:") == 1
    assert text.count("step 2/2") == 2  # its figures, and the evaluation
    code, text = said("train", str(tmp_path / "mine.yaml"), "critic.alhpa=1")
    assert code == 1
    assert text.count("dvpo: unknown config key critic.alhpa") == 1
    code, text = said("train", str(tmp_path / "mine.yaml"))
    assert code == 1
    assert text.count("already holds a run") == 1
    code, text = said("doctor")
    assert code == 1
    assert "only `dvpo train` takes several processes" in text
