"""LoRA: the matrices' arithmetic, what learns and what stands still, the reference without a copy, plain folders."""

import copy
import json
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dvpo import load_critic
from dvpo.cli import main
from dvpo.critic import load_critic as load_bare_critic
from dvpo.errors import InputError
from dvpo.inspection import Question, inspect_checkpoint
from dvpo.loading import load_config
from dvpo.lora import adapted_layers, adapter_writer, add_adapters, merged, without_adapters
from dvpo.policy import Policy
from dvpo.settings import LoraConfig
from dvpo.trainer import Trainer
from fake_vllm import FakeVllm
from runs import LINEAR, Parity, assert_equal, farthest, model_folder, rollout_of, rows, run_config, trained, weights
from test_resume import DiesAt, killed
from tiny_models import tiny_policy

RANK = ["model.lora.rank=4", "model.lora.alpha=6"]
KL = "actor.kl.coef=0.1"
LAYER = "model.layers.0.mlp.down_proj"
TOKENS = torch.randint(2, 264, (3, 9), generator=torch.Generator().manual_seed(0))
ALL = torch.ones_like(TOKENS, dtype=torch.bool)


def adapted(policy: Policy, moved: bool = True, **settings: object) -> Policy:
    """Give a policy adapters, as they stand after some training unless told otherwise."""
    torch.manual_seed(1)
    add_adapters(policy.model, LoraConfig(**{"rank": 4, "alpha": 6, **settings}), "model.lora", "somewhere")
    if moved:
        with torch.no_grad():
            for layer in adapted_layers(policy.model).values():
                layer.lora_B.default.weight.normal_(0, 0.1)
    return policy


def logits(policy: Policy, bare: bool = False) -> Tensor:
    hidden_BSD = Policy(policy.model, policy.tokenizer, adapted=not bare).hidden_states(TOKENS, ALL)
    return policy.logits(hidden_BSD.flatten(0, 1))


def make_trainer(folder: Path, *overrides: str) -> Trainer:
    trainer = Trainer(run_config(folder, *RANK, *overrides), task=Parity())
    trainer.close()
    return trainer


# The arithmetic


def test_the_forward_and_the_gradient_are_those_of_w_x_plus_alpha_over_rank_b_a_x():
    layer = adapted(tiny_policy()).model.get_submodule(LAYER)
    w_OI, a_RI, b_OR = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
    assert (a_RI.shape, b_OR.shape) == ((4, w_OI.shape[1]), (w_OI.shape[0], 4))
    x_KI, g_KO = torch.randn(5, w_OI.shape[1]), torch.randn(5, w_OI.shape[0])
    y_KO = layer(x_KI)
    torch.testing.assert_close(y_KO, x_KI @ w_OI.T + 6 / 4 * x_KI @ a_RI.T @ b_OR.T)
    assert not torch.allclose(y_KO, x_KI @ w_OI.T + x_KI @ a_RI.T @ b_OR.T, atol=1e-3)  # alpha / rank left out
    y_KO.backward(g_KO)
    assert w_OI.grad is None
    torch.testing.assert_close(b_OR.grad, 6 / 4 * g_KO.T @ (x_KI @ a_RI.T))
    torch.testing.assert_close(a_RI.grad, 6 / 4 * (g_KO @ b_OR).T @ x_KI)


def test_before_training_the_policy_is_the_base_bit_for_bit_and_afterwards_the_base_is_still_there():
    plain, policy = tiny_policy(), adapted(tiny_policy(), moved=False)
    assert torch.equal(logits(policy), logits(plain))
    adapted_layers(policy.model)[LAYER].lora_B.default.weight.data.fill_(0.1)
    assert not torch.allclose(logits(policy), logits(plain), atol=1e-3)
    assert torch.equal(logits(policy, bare=True), logits(plain))
    assert not torch.allclose(logits(policy), logits(plain), atol=1e-3)  # and they are on again
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())


def test_without_adapters_ends_when_something_fails_in_it():
    policy = adapted(tiny_policy())
    before = logits(policy)
    with pytest.raises(ZeroDivisionError), without_adapters(policy.model):
        1 / 0  # noqa: B018
    assert torch.equal(logits(policy), before)


def test_all_linear_layers_but_the_head_have_adapters_or_those_that_are_named():
    ends = {name.rpartition(".")[2] for name in adapted_layers(adapted(tiny_policy()).model)}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    some = adapted_layers(adapted(tiny_policy(), targets=("q_proj", "layers.1.mlp.up_proj")).model)
    assert set(some) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])  # gpt2's linear layers are transposed
def test_the_merged_folder_and_the_adapter_folder_are_the_adapted_model(tmp_path: Path, family: str):
    policy = tiny_policy(family)
    policy.save(tmp_path / "base")
    adapted(policy)
    policy.save(tmp_path / "policy")
    adapter_writer(policy.model)(tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = base(TOKENS).logits
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ours = policy.model(TOKENS).logits
    assert not torch.allclose(ours, before, atol=0.01)
    torch.testing.assert_close(whole(TOKENS).logits, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_peft(TOKENS).logits, ours, atol=1e-6, rtol=1e-6)
    theirs = by_peft.merge_and_unload().state_dict()
    mine = merged(policy.model, policy.model.state_dict())
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in mine)
    assert "lora" not in str(load_file(tmp_path / "policy" / "model.safetensors").keys())


# A run


def test_the_reference_is_the_policy_without_its_adapters_and_no_second_model(tmp_path: Path, monkeypatch):
    opened: list[object] = []
    opener = Trainer._open
    monkeypatch.setattr(Trainer, "_open", lambda self, *given: opened.append(given) or opener(self, *given))
    settings = [*RANK, KL, "update.minibatches=1", "policy_optimiser.lr=0.01"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity())
    assert len(opened) == 1
    assert trainer.reference is not None
    assert trainer.reference.model is trainer.policy.model
    assert trainer.train_step()["actor/kl_reference"] == 0  # exactly: B is 0
    assert trainer.train_step()["actor/kl_reference"] > 1e-4
    rollout = rollout_of(trainer)
    start = Trainer._open_start(trainer, model_folder())
    at_start, _ = trainer._token_figures(start, rollout)
    assert torch.equal(trainer._token_figures(trainer.reference, rollout)[0], at_start)
    assert not torch.allclose(trainer._token_figures(trainer.policy, rollout)[0], at_start, atol=1e-3)
    # The wrong variant: with the adapters on, the policy is held against itself and never seems to leave.
    trainer.reference = trainer.policy
    assert trainer.train_step()["actor/kl_reference"] == 0
    trainer.close()


def test_adapters_and_heads_learn_and_the_frozen_weights_are_held_once(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", *RANK, KL), task=Parity())
    policy, critic = trainer.policy.model, trainer.critic
    before = {name: p.detach().clone() for name, p in (*policy.named_parameters(), *critic.named_parameters())}
    trained_ids = {id(p) for o in (trainer.policy_optimiser, trainer.critic_optimiser) for p in o.parameters}
    steps: list[str] = []
    step = trainer._step

    def watched(optimiser, name, *rest):
        with_gradient = {n for n, p in (*policy.named_parameters(), *critic.named_parameters()) if p.grad is not None}
        steps.append(name)
        assert with_gradient
        assert all("lora_" in n or n.startswith("heads.") for n in with_gradient)
        return step(optimiser, name, *rest)

    trainer._step = watched
    trainer.train_step()
    assert set(steps) == {"actor", "critic"}
    for name, p in (*policy.named_parameters(), *critic.named_parameters()):
        learns = "lora_" in name or name.startswith("heads.")
        assert (id(p) in trained_ids) == learns
        assert p.requires_grad == learns
        assert learns or torch.equal(p, before[name])
    theirs = {id(p) for p in policy.parameters()}
    assert all(id(p) in theirs or "lora_" in name for name, p in critic.trunk.named_parameters())
    own = [p for name, p in critic.named_parameters() if "lora_" in name]
    assert own
    assert not any(id(p) in theirs for p in own)
    assert max(float(p.detach().abs().max()) for name, p in critic.named_parameters() if "lora_B" in name) > 0
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    trainer.close()


@pytest.mark.parametrize("trunk", ["frozen", "shared"])
def test_a_trunk_that_is_kept_has_no_adapters_and_a_shared_one_has_the_policys(tmp_path: Path, trunk: str):
    trainer = make_trainer(tmp_path / "run", f"critic.trunk={trunk}")
    assert trainer.critic is not None
    assert not adapted_layers(trainer.critic)
    assert all(name.startswith("heads.") for name, p in trainer.critic.named_parameters() if p.requires_grad)
    if trunk == "frozen":
        theirs = {id(p) for p in trainer.policy.trunk.parameters()}
        assert all(id(p) in theirs for p in trainer.critic.trunk.parameters())


def test_the_critics_adapters_may_be_its_own_or_none(tmp_path: Path):
    own = make_trainer(tmp_path / "own", "critic.lora.rank=2", "critic.lora.targets=[q_proj]").critic
    layers = adapted_layers(own)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj"}
    assert all(layer.r == {"default": 2} and layer.scaling == {"default": 3.0} for layer in layers.values())
    none = make_trainer(tmp_path / "none", "critic.lora.rank=0")
    assert not adapted_layers(none.critic)
    assert all(p.requires_grad for p in none.critic.parameters())
    assert {id(p) for p in none.critic.parameters()}.isdisjoint({id(p) for p in none.policy.model.parameters()})


def test_the_verdict_learns_alone_and_then_the_adapters_and_never_the_frozen_weights(tmp_path: Path):
    settings = ["critic.start=verdict", "critic.verdict_only_steps=1"]
    trainer = Trainer(run_config(tmp_path / "run", *RANK, *settings), task=Parity())
    before = copy.deepcopy(dict(trainer.critic.named_parameters()))

    def moved() -> set[str]:
        now = dict(trainer.critic.named_parameters())
        return {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}

    trainer.train_step()
    assert moved() == {"verdict"}
    trainer.train_step()
    assert moved() == {"verdict", "heads", "trunk"}
    frozen = [name for name in before if name.startswith("trunk.") and "lora_" not in name]
    now = dict(trainer.critic.named_parameters())
    assert all(torch.equal(now[name], before[name]) and now[name].grad is None for name in frozen)
    assert not any(now[name].requires_grad for name in frozen)
    trainer.close()


def test_what_costs_memory_only_changes_nothing(tmp_path: Path):
    how = ["model.gradient_checkpointing=true", "update.microbatch_size=1"]
    one, other = (trained(tmp_path / str(len(more)), *RANK, *LINEAR, KL, *more) for more in ([], how))
    assert farthest(weights(one), weights(other)) < 1e-6


def test_bfloat16_keeps_adapters_in_float32_and_starts_from_the_base(tmp_path: Path):
    run = trained(tmp_path / "run", *RANK, KL, "model.dtype=bfloat16", "update.minibatches=1")
    held = {name: p.dtype for name, p in (*run.policy.model.named_parameters(), *run.critic.named_parameters())}
    assert {kind for name, kind in held.items() if ".base_layer." in name} == {torch.bfloat16}
    assert {kind for name, kind in held.items() if ".base_layer." not in name} == {torch.float32}
    assert rows(run)[0]["actor/kl_reference"] == 0
    assert rows(run)[1]["actor/kl_reference"] > 0


def test_rank_0_is_the_full_run_and_asks_for_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = trained(tmp_path / "full", KL)
    monkeypatch.setitem(sys.modules, "peft", None)  # whoever imports it fails
    off = trained(tmp_path / "off", KL, "model.lora.rank=0", "model.lora.alpha=3")
    assert rows(off) == rows(full)
    assert farthest(weights(off), weights(full)) == 0
    assert not (tmp_path / "off" / "checkpoint-2" / "adapter").exists()
    assert "adapters" not in off.parts


# Checkpoints


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([KL], id="dvpo"),
        pytest.param(["algorithm=ppo", "critic.lora.rank=0"], id="whole-critic", marks=pytest.mark.slow),
        pytest.param(["critic.trunk=frozen", "critic.features=true"], id="frozen", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, settings: list[str]):
    settings = [*RANK, *settings, "steps=4", "checkpoint.every=2", "evaluation.prompts=1"]
    Trainer(run_config(tmp_path / "whole", *settings), task=Parity()).train()
    config = run_config(tmp_path / "run", *settings)
    killed(Trainer(config, task=Parity(), observer=DiesAt("step", 3)).train)
    Trainer(config, task=Parity(), resume=True).train()
    assert_equal(tmp_path / "run", tmp_path / "whole")
    adapter = "checkpoint-4/adapter/adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / adapter) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_what_is_kept_for_a_resume_is_what_was_trained(tmp_path: Path):
    run = trained(tmp_path / "run", *RANK)
    state = run.parts["adapters"].state_dict()
    assert all("lora_" in name for name in state["policy"])
    assert all("lora_" in name or name.startswith("heads.") for name in state["critic"])
    kept = [p for key in ("policy", "critic") for p in state[key].values()]
    optimised = [*run.policy_optimiser.parameters, *run.critic_optimiser.parameters]
    assert {id(p) for p in kept} == {id(p) for p in optimised}


def test_another_base_is_noticed_at_the_resume(tmp_path: Path):
    base = tmp_path / "base"
    tiny = Trainer(run_config(tmp_path / "none"), task=Parity())
    tiny.close()
    tiny.policy.save(base)
    settings = [*RANK, f"model.path={base}", "steps=2"]
    trained(tmp_path / "run", *settings)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = run_config(tmp_path / "run", *settings, "steps=3")
    with pytest.raises(InputError, match="policy's frozen weights are not those that the run began with"):
        Trainer(config, task=Parity(), resume=True)


@pytest.mark.parametrize(
    ("begun", "other", "allow", "sentence"),
    [
        ("dvpo", "critic.num_heads=2", "critic", r"critic.num_heads = 2: the checkpoint's critic has 3, and its form"),
        ("dvpo", "critic.levels=paper", "critic", r"critic.levels = paper: the checkpoint's critic has midpoint"),
        ("ppo_hl_gauss", "critic.histogram.high=2", "critic", r"critic.histogram: .* has its bins elsewhere"),
        ("dvpo", "model.lora.rank=2", "model", r"model.lora: the shape of .*lora_A.* was \(4, .*\) and is \(2, .*\),"),
        ("dvpo", "critic.lora.rank=2", "critic", r"critic.lora: the shape of .*lora_A.* was \(4, .*\) and is \(2, .*"),
        ("dvpo", "model.lora.targets=[q_proj]", "model", r"model.lora: .*_proj.* was \(4, .*\) and is None, and what"),
    ],
)
def test_a_resume_that_may_differ_keeps_the_form_of_what_was_trained(
    tmp_path: Path, begun: str, other: str, allow: str, sentence: str
):
    settings = [*RANK, f"algorithm={begun}"]
    trained(tmp_path / "run", *settings, "steps=1")
    config = run_config(tmp_path / "run", *settings, other)
    with pytest.warns(UserWarning, match="as --allow says"), pytest.raises(InputError, match=sentence):
        Trainer(config, task=Parity(), resume=True, allow=[allow])


def test_a_checkpoints_critic_is_plain_and_predicts_what_the_adapted_one_does(tmp_path: Path):
    run = trained(tmp_path / "run", *RANK, "critic_optimiser.lr=0.01")
    again = load_bare_critic(tmp_path / "run" / "checkpoint-2" / "critic")
    assert not adapted_layers(again)
    with torch.no_grad():
        ours = run.critic(run.critic.hidden_states(TOKENS, ALL, run.policy))
        theirs = again(again.hidden_states(TOKENS, ALL, run.policy))
        with without_adapters(run.critic):
            bare = run.critic(run.critic.hidden_states(TOKENS, ALL, run.policy))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(bare, ours, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["dvpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_the_commands_train_resume_and_read_a_run_with_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        f"""
        output: run
        algorithm: {algorithm}
        steps: 2
        model: {{lora: {{rank: 8}}}}
        actor: {{kl: {{coef: 0.01}}}}
        sampling: {{prompts_per_step: 2, samples_per_prompt: 2}}
        evaluation: {{prompts: 2}}
        """
    )
    assert main(["train", "mine.yaml"]) == 0
    assert main(["train", "mine.yaml", "steps=3", "--resume"]) == 0
    settings = json.loads((tmp_path / "run/checkpoint-3/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (8, 32.0, 0.0)
    assert Path(settings["base_model_name_or_path"]).is_dir()
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    by_peft = PeftModel.from_pretrained(base, "run/checkpoint-3/adapter")
    plain = AutoModelForCausalLM.from_pretrained("run/checkpoint-3/policy")
    torch.testing.assert_close(plain(TOKENS).logits, by_peft(TOKENS).logits, atol=1e-5, rtol=1e-5)
    out = StringIO()
    inspect_checkpoint("run", Question(prompt="2+3=", response="5", reward=1.0), "value", None, None, Console(file=out))
    assert "checkpoint 3" in out.getvalue()
    if algorithm == "dvpo":
        assert len(load_critic("run").scores(["2+3="], ["5"])) == 1
        assert main(["eval", "run", "evaluation.prompts=2"]) == 0
        assert main(["report", "run"]) == 0


def test_a_vllm_server_is_given_the_merged_weights(tmp_path: Path):
    with FakeVllm(model_folder()) as fake:
        how = ("sampling.engine=vllm", f"sampling.vllm.address={fake.address}", *RANK, KL, "evaluation.prompts=1")
        served = rows(trained(tmp_path / "served", *how, "policy_optimiser.lr=0.01"))
    # Before a step's update the server draws by the trainer's policy, and that has left its base.
    assert all(row["actor/sampler_mismatch"] < 1e-5 for row in served)
    assert served[1]["actor/kl_reference"] > 1e-3


# What is refused


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.lora.rank=-1"], "model.lora.rank = -1 is not valid"),
        (["model.lora.alpha=0", "model.lora.rank=4"], "model.lora.alpha = 0 is not valid"),
        (["model.lora.dropout=0.1"], "unknown config key model.lora.dropout"),
        (["model.lora.rank=4", "critic.trunk=shared", "critic.lora.rank=2"], "critic.trunk = shared: set it to own"),
        (["critic.lora.rank=2"], "model.lora.rank is above 0: set that too"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(InputError) as refusal:
        load_config({}, overrides)
    assert sentence in str(refusal.value)


def test_a_run_without_peft_is_refused_before_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # whoever imports it fails
    config = run_config(tmp_path / "run", *RANK, "model.path=/nowhere")
    with pytest.raises(InputError, match=r"model.lora.rank = 4 needs peft.*pip install 'dvpo\[lora\]'"):
        Trainer(config, task=Parity())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens"])
def test_targets_that_are_no_layer_are_refused_with_those_that_are(tmp_path: Path, target: str):
    with pytest.raises(InputError, match=rf"model.lora.targets: '{target}'.*down_proj, gate_proj, k_proj"):
        make_trainer(tmp_path / "run", f"model.lora.targets=[{target}]")
