"""Several processes train like one: whole models and sharded ones, checkpoints across their number, signals."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvpo.checkpoint import latest_checkpoint, load_state
from dvpo.critic import load_critic
from dvpo.distributed import share
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.parallel import refuse_processes
from dvpo.policy import open_policy
from dvpo.prompts import PromptStream
from dvpo.runlog import read_rows
from processes import failing, launch
from runs import LINEAR, Parity, run_config, trained

# Three prompts on two processes: unequal shares. One minibatch may then leave a process without any response.
UNEVEN = ["sampling.prompts_per_step=3", "sampling.samples_per_prompt=2", "update.minibatches=3", "update.epochs=2"]
BUSY = [*UNEVEN, *LINEAR, "actor.kl.coef=0.1", "actor.entropy_coef=0.01", "sampling.resample_rounds=1", "steps=2"]
BUDGET = "update.max_tokens_per_microbatch=60"
LORA = [*LINEAR, "model.lora.rank=4", "actor.kl.coef=0.1", "sampling.prompts_per_step=3", "update.minibatches=3"]
STRATEGIES = ("ddp", "fsdp")
pytestmark = pytest.mark.timeout(900)

FAULTY = [*LINEAR, "steps=2", "sampling.prompts_per_step=4", "sampling.samples_per_prompt=2", "log.completions=8"]
FAULTY += ["evaluation.prompts=1", "reward.timeout=3", "reward.norm=batch"]
MANNERS = ("raises", "abstains", "hangs", "dies")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def assert_same_figures(folder: Path, single: Path, relative: float = 2e-4) -> None:
    """Every metric of every step and evaluation, to float32's rounding."""
    ours, theirs = metrics_of(folder), metrics_of(single)
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for key in own:
            # The mismatch is itself nothing but rounding.
            near = pytest.approx(other[key], rel=relative, abs=2e-6, nan_ok=True) if other[key] is not None else None
            assert own[key] == near, (own["step"], key)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    policy, critic = checkpoint / "policy" / "model.safetensors", checkpoint / "critic" / "critic.safetensors"
    weights = {f"policy.{name}": tensor for name, tensor in load_file(policy).items()}
    return weights | {f"critic.{name}": tensor for name, tensor in load_file(critic).items()}


def assert_same_weights(folder: Path, single: Path, tolerance: float = 2e-6) -> None:
    ours, theirs = final_weights(folder), final_weights(single)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def prompts_of_both_steps() -> list[str]:
    """Of `FAULTY`: of each step's four prompts the first two are the first of two processes'."""
    return [example.columns["answer"] for example, _ in PromptStream(Parity().split("train"), seed=0).next(8)]


def manners_of_the_second_process() -> dict[str, str]:
    """Its prompts in both steps of `FAULTY`, and how all responses to them fail."""
    own = [prompt for place, prompt in enumerate(prompts_of_both_steps()) if place % 4 >= 2]
    return dict(zip(own, MANNERS, strict=True))


def seen_by(answers: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    return [a["processes"] for a in answers], [a["rank"] for a in answers]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and two of each strategy trained the same; two were interrupted, one process went on."""
    place = tmp_path_factory.mktemp("parallel")
    trained(place / "one", *BUSY, "log.completions=6")
    trained(place / "one-lora", *LORA)
    trained(place / "longer", *LINEAR, "steps=4", "sampling.prompts_per_step=2")
    runs: list[dict[str, Any]] = [
        {
            "output": str(place / name),
            "overrides": [*BUSY, BUDGET, "log.completions=6", f"distributed.strategy={name}"],
        }
        for name in STRATEGIES
    ]
    runs += [
        {
            "output": str(place / f"stopped-{name}"),
            "overrides": [*LINEAR, "steps=4", "sampling.prompts_per_step=2", f"distributed.strategy={name}"],
            "signal": [1, 3],
        }
        for name in STRATEGIES
    ]
    manners = manners_of_the_second_process()
    trained(place / "one-faulty", *FAULTY, reward=failing(manners))
    # A quarter of the rewards is lost in step 1 and half in step 2, all of the second process and none of the first.
    runs += [
        {"output": str(place / f"faulty-{bound}"), "overrides": [*FAULTY, f"reward.max_fault_share={bound}", strategy]}
        | {"failing": manners}
        for bound, strategy in ((0.5, "distributed.strategy=fsdp"), (0.24, "distributed.strategy=ddp"))
    ]
    runs += [
        {"output": str(place / f"{name}-lora"), "overrides": [*LORA, f"distributed.strategy={name}"]}
        for name in STRATEGIES
    ]
    answers = launch(place, 2, runs)
    assert [seen_by(said) for said in answers] == [([2, 2], [0, 1])] * 8
    ended = [[a["ended"] for a in said] for said in answers]
    assert ended[:5] == [["done"] * 2] * 2 + [["SIGTERM"] * 2] * 2 + [["done"] * 2]
    assert [said.partition(" to a fault")[0] for said in ended[5]] == ["step 1: 2 of 8 responses lost their reward"] * 2
    assert ended[6:] == [["done"] * 2] * 2
    return place


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_figures_and_the_weights_of_one(place: Path, strategy: str):
    assert_same_figures(place / strategy, place / "one")
    assert_same_weights(place / strategy, place / "one")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_the_adapters_of_one(place: Path, strategy: str):
    assert_same_figures(place / f"{strategy}-lora", place / "one-lora")
    assert_same_weights(place / f"{strategy}-lora", place / "one-lora")
    adapters = [
        load_file(place / f"{name}-lora/checkpoint-2/adapter/adapter_model.safetensors") for name in (strategy, "one")
    ]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=0, atol=2e-6)
    assert max(float(tensor.abs().max()) for name, tensor in adapters[0].items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_main_process_logs_the_completions_of_all_in_the_order_of_the_step(place: Path, strategy: str):
    ours, theirs = (list(read_rows(place / name / "completions.jsonl")) for name in (strategy, "one"))
    assert len(ours) == 12  # two steps of six, of three prompts
    assert ours == theirs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_processes_holds_plain_folders_that_anybody_opens(place: Path, strategy: str):
    checkpoint = latest_checkpoint(place / strategy)
    assert checkpoint is not None
    policy = open_policy(checkpoint / "policy", torch.device("cpu"))
    assert type(policy.model).__name__ == "Qwen3ForCausalLM"
    assert policy.model.config.architectures == ["Qwen3ForCausalLM"]
    assert load_critic(checkpoint / "critic").shape.num_quantiles == 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_process_stops_both_at_one_step_and_one_process_goes_on_to_the_same_end(
    place: Path, strategy: str
):
    stopped = place / f"stopped-{strategy}"
    checkpoint = latest_checkpoint(stopped)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"  # step 3 had only been sampled
    trained(stopped, *LINEAR, "steps=4", "sampling.prompts_per_step=2", resume=True)
    assert_same_figures(stopped, place / "longer")
    assert_same_weights(stopped, place / "longer")


def test_rewards_that_fail_on_one_process_are_counted_for_both_and_missing_for_both(place: Path):
    manners = manners_of_the_second_process()
    assert_same_figures(place / "faulty-0.5", place / "one-faulty")
    ours, theirs = (list(read_rows(place / name / "faults.jsonl")) for name in ("faulty-0.5", "one-faulty"))
    assert [(row["prompt"][-1]["content"], row["kind"]) for row in ours] == [
        (prompt, kind)
        for prompt, kind in zip(manners, ("exception", None, "timeout", "worker_died"), strict=True)
        for _ in range(2)
        if kind
    ]
    assert ours == theirs
    steps = [row for row in metrics_of(place / "faulty-0.5") if "reward/faults" in row]
    assert [row["reward/faults"] for row in steps] == [2.0, 4.0]
    assert [row["reward/faults_worker_died"] for row in steps] == [0.0, 2.0]
    assert [row["reward/missing"] for row in steps] == [0.5, 0.5]


def test_too_many_faults_of_one_process_stop_both_after_a_checkpoint(place: Path):
    assert [row["kind"] for row in read_rows(place / "faulty-0.24" / "faults.jsonl")] == ["exception"] * 2
    checkpoint = latest_checkpoint(place / "faulty-0.24")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-0"


def test_moments_of_sharded_weights_are_kept_whole(place: Path):
    one, two = (load_state(latest_checkpoint(place / name))["critic_optimiser"]["state"] for name in ("one", "fsdp"))  # type: ignore[arg-type]
    assert one.keys() == two.keys()
    for number, moments in one.items():
        assert moments.keys() == two[number].keys()
        torch.testing.assert_close(two[number]["exp_avg"], moments["exp_avg"], rtol=1e-3, atol=1e-6)


def test_shares_follow_each_other_and_are_everything(monkeypatch: pytest.MonkeyPatch):
    for count, processes in ((7, 3), (2, 4), (4, 4), (5, 1)):
        monkeypatch.setattr("dvpo.distributed.world_size", lambda size=processes: size)
        shares = []
        for rank in range(processes):
            monkeypatch.setattr("dvpo.distributed.rank", lambda rank=rank: rank)
            shares.append(share(count))
        assert [thing for own in shares for thing in own] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_several_processes_cannot_do_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = run_config(tmp_path / "run")
    with pytest.raises(InputError, match="strategy = fsdp shards models over processes that torchrun starts"):
        refuse_processes(
            dataclasses.replace(config, distributed=load_config({}, ["distributed.strategy=fsdp"]).distributed)
        )
    monkeypatch.setattr("dvpo.parallel.world_size", lambda: 3)
    with pytest.raises(InputError, match="prompts_per_step = 2 is less than the 3 processes"):
        refuse_processes(config)
    with pytest.raises(InputError, match="cpu_offload = true moves shares"):
        run_config(tmp_path / "run", "distributed.cpu_offload=true")
    with pytest.raises(InputError, match=r"verdict_only_steps = 2 .* fsdp cannot"):
        run_config(tmp_path / "run", "critic.start=verdict", "critic.verdict_only_steps=2", "distributed.strategy=fsdp")
