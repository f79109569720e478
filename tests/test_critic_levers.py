"""The levers that feed a critic, in whole runs: each does what it says, to a scalar and to a quantile critic alike."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvpo.batch import Rollout
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.runlog import TIME_PREFIX, read_rows
from dvpo.trainer import Trainer
from runs import Parity, Talk, run_config

each_critic = pytest.mark.parametrize("algorithm", ["dvpo", "ppo"])


def opened(folder: Path, *overrides: str, **given: Any) -> Trainer:
    return Trainer(run_config(folder, *overrides), task=Parity(), **given)


def copies(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def optimiser_steps(trainer: Trainer) -> list[str]:
    """Whose optimiser moves, in a list that grows."""
    calls: list[str] = []
    step = trainer._step
    trainer._step = lambda optimiser, name, *rest: calls.append(name) or step(optimiser, name, *rest)
    return calls


# Epochs


def test_the_critic_has_as_many_epochs_as_it_is_given_whatever_the_actor_has(tmp_path: Path):
    for critic, actor, expected in ((3, 1, "cacacccc"), (1, 2, "cacaaa"), ("null", 2, "cacacaca")):
        trainer = opened(tmp_path / f"{critic}", f"critic.epochs={critic}", f"update.epochs={actor}")
        calls = optimiser_steps(trainer)
        trainer.train_step()
        trainer.close()
        assert "".join(name[0] for name in calls) == expected  # two minibatches an epoch


@each_critic
def test_more_critic_epochs_train_the_critic_and_leave_the_steps_policy_update_bit_for_bit(
    tmp_path: Path, algorithm: str
):
    one, four = (opened(tmp_path / str(n), f"critic.epochs={n}", f"algorithm={algorithm}") for n in (1, 4))
    for trainer in (one, four):
        trainer.train_step()
        trainer.close()
    assert same(copies(one.policy.model), copies(four.policy.model))
    assert not same(copies(one.critic), copies(four.critic))


def test_the_warm_up_is_the_pretraining_and_takes_the_critics_own_epochs_and_replay(tmp_path: Path):
    settings = ["update.actor_warmup_steps=2", "critic.epochs=2", "critic.replay=1"]
    trainer = opened(tmp_path / "run", *settings)
    calls = optimiser_steps(trainer)
    for _ in range(2):
        trainer.train_step()
    trainer.close()
    assert calls == ["critic"] * (4 + 4 + 2)


# Replay


@each_critic
def test_each_step_the_critic_sees_the_last_steps_again_and_the_policy_does_not(tmp_path: Path, algorithm: str):
    trainer = opened(tmp_path / "run", "critic.replay=2", f"algorithm={algorithm}")
    calls, figures = optimiser_steps(trainer), []
    for _ in range(4):
        figures.append(trainer.train_step())
        calls.append("|")
    trainer.close()
    assert "".join(name[0] for name in calls) == "caca|cacacc|cacacccc|cacacccc|"
    assert ["replay/loss" in row for row in figures] == [False, True, True, True]
    assert all(math.isfinite(row["replay/loss"]) for row in figures[1:])


def test_what_is_replayed_keeps_its_rewards_and_gets_the_targets_of_todays_critic(tmp_path: Path, monkeypatch):
    trainer = opened(tmp_path / "run", "critic.replay=2", "critic_optimiser.lr=0.01")
    seen: list[tuple[int, Rollout, Tensor]] = []
    estimate = trainer.estimate

    def spy(rollout: Rollout) -> Any:
        made = estimate(rollout)
        seen.append((trainer.step, rollout, made[0].targets_BTL))
        return made

    monkeypatch.setattr(trainer, "estimate", spy)
    for _ in range(3):
        trainer.train_step()
    trainer.close()
    fresh = {step: (rollout, targets) for step, rollout, targets in (seen[0], seen[1], seen[3])}
    assert [step for step, *_ in seen] == [1, 2, 2, 3, 3, 3]
    for (_, rollout, targets_BTL), born in zip((seen[2], seen[4], seen[5]), (1, 1, 2), strict=True):
        assert torch.equal(rollout.tokens_BS, fresh[born][0].tokens_BS)
        assert torch.equal(rollout.rewards_BT, fresh[born][0].rewards_BT)
        assert not torch.allclose(targets_BTL, fresh[born][1])


ALL = [
    "critic.epochs=2",
    "critic.replay=3",
    "critic.features=true",
    "critic.start=verdict",
    "critic.verdict_only_steps=3",
    "critic.privileged=answer",
]


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    rows = read_rows(trainer.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith((TIME_PREFIX, "eval/"))} for row in rows]


@each_critic
def test_with_every_lever_a_resumed_run_ends_bit_for_bit_and_one_that_forgot_the_replay_would_not(
    tmp_path: Path, algorithm: str
):
    settings = [*ALL, f"algorithm={algorithm}"]
    whole = opened(tmp_path / "whole", *settings, "steps=6")
    whole.train()
    for forgets in (False, True):
        folder = tmp_path / f"{forgets}"
        opened(folder, *settings, "steps=4").train()
        resumed = opened(folder, *settings, "steps=6", resume=True)
        if forgets:
            resumed.replay.load_state_dict({"rollouts": []})
        resumed.train()
        assert same(copies(resumed.policy.model), copies(whole.policy.model)) != forgets
        assert same(copies(resumed.critic), copies(whole.critic)) != forgets
        if not forgets:
            assert [r for r in log_of(resumed) if len(r) > 1] == [r for r in log_of(whole) if len(r) > 1]


# Verdict start


@each_critic
def test_in_the_first_steps_only_the_verdicts_scale_and_bias_learn_and_then_all_the_rest(
    tmp_path: Path, algorithm: str
):
    settings = ["critic.start=verdict", "critic.verdict_only_steps=1", "critic_optimiser.weight_decay=0.1"]
    trainer = opened(tmp_path / "run", *settings, f"algorithm={algorithm}")
    for expected in ({"verdict.moved"}, {"heads.linear.weight", "heads.linear.bias", "verdict.direction"}):
        before = {name: p.detach().clone() for name, p in trainer.critic.named_parameters()}
        trainer.train_step()
        moved = {name for name, p in trainer.critic.named_parameters() if not torch.equal(p, before[name])}
        assert {name for name in moved if not name.startswith("trunk.")} == expected
        assert any(name.startswith("trunk.") for name in moved) == ("verdict.moved" not in expected)
    trainer.close()


@each_critic
def test_the_shipped_model_knows_right_from_wrong_by_its_verdict_and_a_random_head_does_not(
    tmp_path: Path, algorithm: str
):
    """Step 1 logs what the critic knew before any update: 128 responses, the checker's dial at 1."""
    known = {}
    for start in ("verdict", "random"):
        given = ["steps=1", f"output={tmp_path / start}", f"critic.start={start}", f"algorithm={algorithm}"]
        trainer = Trainer(load_config(None, [*given, "model.checker=1"]))
        known[start] = trainer.train_step()["critic/true_correlation"]
        trainer.close()
    assert known["verdict"] > 0.2
    assert abs(known["random"]) < 0.15


def test_a_verdict_that_is_no_token_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"critic.verdict_tokens: 'right' is 5 tokens of this model"):
        opened(tmp_path / "run", "critic.start=verdict", "critic.verdict_tokens=[right, wrong]")


def test_verdict_steps_without_a_verdict_and_privilege_without_an_own_trunk_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"set critic.start to verdict, or the steps to 0"):
        run_config(tmp_path, "critic.verdict_only_steps=3")
    with pytest.raises(InputError, match=r"critic.trunk = shared: set it to own"):
        run_config(tmp_path, "critic.privileged=answer", "critic.trunk=shared")


# Features


def test_the_entropies_of_a_rollout_are_those_of_the_distribution_at_sampling(tmp_path: Path):
    trainer = opened(tmp_path / "run", "critic.features=true")  # temperature 1.2
    rollout, _ = trainer.collect()
    row, length = 0, int(rollout.mask_BT[0].sum())
    tokens_S = rollout.tokens_BS[row][rollout.attention_BS[row]]
    with torch.no_grad():
        logprobs_SV = (trainer.policy.model(tokens_S[None]).logits[0] / 1.2).log_softmax(dim=-1)
    states_TV = logprobs_SV[-length - 1 : -1]
    torch.testing.assert_close(rollout.entropies_BT[row, :length], -(states_TV.exp() * states_TV).sum(dim=-1))
    assert (rollout.entropies_BT[~rollout.mask_BT] == 0).all()
    assert (rollout.entropies_BT[rollout.mask_BT] > 0).all()
    trainer.close()


def test_features_are_0_behind_a_token_of_the_environment_and_behind_no_other(tmp_path: Path):
    settings = ["critic.features=true", "sampling.max_completion_length=24"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Talk())
    rollout, _ = trainer.collect()
    answers_BT = ~rollout.mask_BT & rollout.attention_BS[:, rollout.prompt_length :]
    assert answers_BT.any()
    with torch.no_grad():
        behind_BT2 = trainer.critic.states(rollout, trainer.policy)[:, 1:, -2:]
    assert (behind_BT2[answers_BT] == 0).all()
    assert (behind_BT2[rollout.mask_BT] != 0).all()
    trainer.close()


# Privilege


def test_the_critic_reads_the_hint_and_the_policy_does_not(tmp_path: Path):
    trainer = opened(tmp_path / "run", "critic.privileged=answer")
    rollout, _ = trainer.collect()
    other = replace(rollout, hints_BH=rollout.hints_BH.flip(0))
    assert not torch.equal(other.hints_BH, rollout.hints_BH)
    with torch.no_grad():
        assert (trainer._values(other)[0] - trainer._values(rollout)[0])[rollout.mask_BT].abs().max() > 1e-5
    assert torch.equal(
        trainer._token_figures(trainer.policy, other)[0], trainer._token_figures(trainer.policy, rollout)[0]
    )
    trainer.close()


def test_the_hint_under_pseudo_labels_is_the_label_that_the_reward_believes_and_not_the_truth(tmp_path: Path):
    labels = tmp_path / "labels.jsonl"
    examples = Parity().split("train")
    labels.write_text("".join(json.dumps({"id": e.id, "answer": f"label of {e.id}"}) + "\n" for e in examples))
    settings = ["critic.privileged=answer", "noise.kind=pseudo_labels", f"noise.path={labels}"]
    trainer = opened(tmp_path / "run", *settings)
    rollout, _ = trainer.collect()
    texts = [trainer.collector.encoder.text([t for t in row if t >= 0]) for row in rollout.hints_BH.tolist()]
    assert texts == [f"label of {prompt_id}\n" for prompt_id in rollout.prompt_ids]
    trainer.close()


def test_the_hint_of_a_prompt_without_a_label_is_the_answer_of_the_data(tmp_path: Path):
    labels = tmp_path / "labels.jsonl"
    believed = {e.id: f"label of {e.id}" for e in Parity().split("train")[::2]}
    labels.write_text("".join(json.dumps({"id": i, "answer": answer}) + "\n" for i, answer in believed.items()))
    settings = ["critic.privileged=answer", "noise.kind=pseudo_labels", f"noise.path={labels}"]
    settings += ["sampling.prompts_per_step=16", "sampling.samples_per_prompt=2"]  # every prompt there is
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity())
    rollout, _ = trainer.collect()
    texts = [trainer.collector.encoder.text([t for t in row if t >= 0]) for row in rollout.hints_BH.tolist()]
    # Parity's own answer is the text of its prompt, which is its id.
    assert texts == [f"{believed.get(prompt_id, prompt_id)}\n" for prompt_id in rollout.prompt_ids]
    assert rollout.rewarded_B.tolist() == [prompt_id in believed for prompt_id in rollout.prompt_ids]
    assert 0 < rollout.rewarded_B.sum() < len(rollout)
    trainer.close()
