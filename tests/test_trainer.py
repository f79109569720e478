"""The training step as a whole: what must not matter does not, what goes wrong does not spread, all is on record."""

import dataclasses
import json
import math
import re
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpo import load_critic
from dvpo import trainer as trainer_module
from dvpo.algorithms import ALGORITHMS
from dvpo.answers import Answerer
from dvpo.batch import Estimates, Rollout
from dvpo.embedded import make_tokenizer
from dvpo.errors import InputError
from dvpo.evaluate import evaluate_checkpoint
from dvpo.inspection import Question, answered, find_example, open_subject
from dvpo.loading import load_config
from dvpo.metrics import Means
from dvpo.scoring import longest_scoring
from dvpo.tasks import SingleTurn
from dvpo.trainer import Trainer
from dvpo.warmstart import warm_start
from runs import LINEAR, Parity, farthest, model_folder, rollout_of, rows, run_config, trained, weights

# What is refused at the start, or said


class Long(Parity):
    """One of the two prompts `ood` is longer than the others."""

    def split(self, name: str):
        examples = super().split(name)
        long = [{"role": "user", "content": "word " * 20}]
        return [dataclasses.replace(examples[0], prompt=long), *examples[1:]] if name == "ood" else examples


def test_held_out_prompts_that_are_too_long_are_refused_left_out_or_cut_as_those_to_train_on(tmp_path: Path):
    def run(long_prompts: str) -> Trainer:
        overrides = ("sampling.max_prompt_length=60", f"sampling.long_prompts={long_prompts}")
        return Trainer(run_config(tmp_path / long_prompts, *overrides), task=Long())

    with pytest.raises(InputError, match=r"prompt ood 0 has \d+ tokens, more than sampling.max_prompt_length = 60"):
        run("error")
    with pytest.warns(UserWarning, match=r"skip: 1 of 2 prompts of ood are longer than .* and count in no"):
        skipping = run("skip")
    assert skipping.evaluate()["eval/ood/items"] == 1
    assert run("truncate").evaluate()["eval/ood/items"] == 2


def test_a_prompt_that_an_environment_made_longer_than_the_context_allows_is_refused_in_training_too(tmp_path: Path):
    class Verbose(SingleTurn):
        def reset(self):
            return [{"role": "user", "content": "word " * 120}]

    class Growing(Parity):
        environment = staticmethod(Verbose)

    trainer = Trainer(run_config(tmp_path, "sampling.max_prompt_length=1000"), task=Growing())
    with pytest.raises(InputError, match=r"gave a prompt of \d+ tokens, more than sampling.max_prompt_length = \d{3}:"):
        trainer.train_step()


def test_every_prompt_of_a_run_and_of_what_reads_it_is_rendered_as_model_template_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    render = PreTrainedTokenizerBase.apply_chat_template

    def spy(self: PreTrainedTokenizerBase, messages: object, **arguments: object) -> object:
        told.append(arguments.get("enable_thinking"))
        return render(self, messages, **arguments)

    def check() -> None:
        assert told
        assert set(told) == {False}
        told.clear()

    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking %}{% endif %}"
    shutil.copytree(model_folder(), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", spy)
    overrides = ("steps=1", f"model.path={tmp_path}/model", "model.template={enable_thinking: false}")
    config = run_config(tmp_path / "run", *overrides)
    Trainer(config).train()
    check()
    evaluate_checkpoint(tmp_path / "run", [], ["id"], 0, None)
    check()
    subject = open_subject(str(tmp_path / "run"))
    answered(subject, find_example(subject, Question()), Question(response="5"))
    check()
    load_critic(tmp_path / "run").read(["2+3="], ["5"])
    check()
    Answerer(config, subject.task, "labels")
    check()


# What must not matter


class WrongDenominator(Trainer):
    """Each micro-batch divides by its own tokens, and the gradients are averaged: the usual mistake."""

    def _update_critic(self, rollout: Rollout, estimates: Estimates, rows: Tensor, means: Means) -> None:
        self._part_by_part(super()._update_critic, self.critic, self.critic_optimiser, rollout, estimates, rows, means)

    def _update_actor(self, rollout: Rollout, estimates: Estimates, rows: Tensor, means: Means) -> None:
        model = self.policy.model
        self._part_by_part(super()._update_actor, model, self.policy_optimiser, rollout, estimates, rows, means)

    def _part_by_part(self, update, module, optimiser, rollout, estimates, rows, means) -> None:
        parts = rows.split(self.config.update.microbatch_size)
        step, self._step = self._step, lambda *_: None
        for part in parts:
            update(rollout, estimates, part, means)
        self._step = step
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(parts)
        self._step(optimiser, "wrong", torch.zeros(()), means)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_sum_fixed_length"])
@pytest.mark.parametrize("algorithm", ["dvpo", "ppo"])
def test_weights_do_not_depend_on_the_micro_batch(tmp_path: Path, algorithm: str, aggregation: str):
    settings = [*LINEAR, f"algorithm={algorithm}", f"actor.aggregation={aggregation}", "actor.entropy_coef=0.01"]
    start = weights(Trainer(run_config(tmp_path / "start", *settings), task=Parity()))
    whole = weights(trained(tmp_path / "6", *settings, "update.microbatch_size=6"))
    assert farthest(whole, start) > 1e-3
    for size in (1, 2):
        cut = weights(trained(tmp_path / str(size), *settings, f"update.microbatch_size={size}"))
        assert farthest(cut, whole) < 1e-6
    # Prompts of some 20 tokens and responses of up to 12: one, two or three of them.
    for tokens in (1, 80):
        budget = weights(
            trained(tmp_path / f"{tokens}-tokens", *settings, f"update.max_tokens_per_microbatch={tokens}")
        )
        assert farthest(budget, whole) < 1e-6


def test_a_denominator_of_the_micro_batch_would_be_noticed(tmp_path: Path):
    whole = weights(trained(tmp_path / "6", *LINEAR, "update.microbatch_size=6"))
    wrong = weights(trained(tmp_path / "1", *LINEAR, "update.microbatch_size=1", kind=WrongDenominator))
    assert farthest(wrong, whole) > 1e-4


def test_the_same_seed_gives_the_same_metrics_and_weights_and_another_seed_others(tmp_path: Path):
    one, same = trained(tmp_path / "one"), trained(tmp_path / "same")
    other = trained(tmp_path / "other", "seed=1")
    assert rows(one) == rows(same)
    assert farthest(weights(one), weights(same)) == 0
    assert rows(one) != rows(other)


def test_noise_of_rate_0_is_a_clean_run_bit_for_bit(tmp_path: Path):
    clean = trained(tmp_path / "clean")
    for kind in ("flip", "persistent"):
        noisy = trained(tmp_path / kind, f"noise.kind={kind}", "noise.rate=0")
        assert rows(noisy) == rows(clean)
        assert farthest(weights(noisy), weights(clean)) == 0


def drawn(folder: Path, *overrides: str) -> list[tuple[int, str, int, int, bool]]:
    """(step, prompt, visit, sample, flipped) of every response."""
    flips = ["noise.kind=flip", "noise.rate=0.4", "log.completions=100", "steps=4"]
    found = rows(trained(folder, *flips, *overrides), "completions")
    return [(r["step"], r["prompt_id"], r["visit"], r["sample"], r["observed"] != r["true"]) for r in found]


def test_both_rows_see_the_same_prompts_in_the_same_order_and_the_same_labels_flipped(tmp_path: Path):
    dvpo = drawn(tmp_path / "dvpo")
    assert 0 < sum(flipped for *_, flipped in dvpo) < len(dvpo)
    assert dvpo == drawn(tmp_path / "ppo", "algorithm=ppo")


def test_processes_wait_for_each_other_as_long_as_config_and_rewards_say(tmp_path: Path, monkeypatch):
    waits: list[timedelta] = []
    monkeypatch.setattr("dvpo.trainer.init_from_env", lambda device, wait: waits.append(wait) or torch.device(device))
    config = run_config(tmp_path / "run", "distributed.patience=7200")
    Trainer(config, task=Parity()).close()
    assert waits == [timedelta(seconds=7200 + longest_scoring(config))]
    assert load_config().distributed.patience == 1800


def test_which_labels_are_wrong_does_not_depend_on_how_the_batch_is_laid_out(tmp_path: Path):
    two = {key: flipped for _, *key, flipped in drawn(tmp_path / "two") for key in [tuple(key)]}
    four = {
        key: flipped
        for _, *key, flipped in drawn(tmp_path / "four", "sampling.prompts_per_step=4", "sampling.batch_size=5")
        for key in [tuple(key)]
    }
    assert set(two) < set(four)
    assert all(four[key] == flipped for key, flipped in two.items())


# What a run leaves behind


def test_returns_of_the_critics_figures_are_discounted_by_gamma_and_know_no_lambda(tmp_path: Path):
    settings = ["algorithm=ppo", "advantage.gamma=0.5", "advantage.lam=0.3", "advantage.critic_lam=0"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity([1.0, 1.0]))
    rollout = rollout_of(trainer)
    _, figures = trainer.estimate(rollout)
    # A reward R at the last of n tokens: returns R (1 + 1/2 + ... ) = R (2 - 2^(1-n)) in all, and of their squares
    # R^2 (1 + 1/4 + ...) = R^2 (4 - 4^(1-n)) / 3.
    lengths_B, rewards_B = rollout.mask_BT.sum(dim=1).double(), rollout.observed_B.double()
    tokens = float(lengths_B.sum())
    total = float((rewards_B * (2 - 2.0 ** (1 - lengths_B))).sum())
    squares = float((rewards_B.square() * (4 - 4.0 ** (1 - lengths_B)) / 3).sum())
    assert total < 0.9 * float((rewards_B * lengths_B).sum())  # undiscounted it would be another number
    assert figures["critic/return_mean"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["critic/return_size"] == pytest.approx(math.sqrt(squares / tokens), rel=1e-5)
    trainer.close()


def test_the_deviation_of_the_advantages_is_logged_as_it_was_before_whitening(tmp_path: Path):
    settings = ["algorithm=ppo", "advantage.lam=1"]
    trainer = Trainer(run_config(tmp_path / "run", *settings), task=Parity([1.0] * 3 + [0.0] * 3))
    with torch.no_grad():
        for parameter in trainer.critic.heads.parameters():
            parameter.zero_()
    rollout = rollout_of(trainer)
    estimates, figures = trainer.estimate(rollout)
    # V = 0 and lambda = 1: the advantage is the reward, 1 for a share s of the tokens, so its variance is s (1 - s).
    share = float(rollout.mask_BT[:3].sum() / rollout.mask_BT.sum())
    assert figures["actor/advantage_std"] == pytest.approx(math.sqrt(share * (1 - share)), rel=1e-4)
    assert float(estimates.advantages_BT[estimates.mask_BT].std(unbiased=False)) == pytest.approx(1, abs=1e-3)
    trainer.close()


def test_the_time_of_a_step_holds_its_three_parts_and_scoring_is_no_more_than_scoring(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", "algorithm=grpo"), task=Parity())
    kept, waited = trainer.collect, 0.2

    def slow() -> object:  # after the scoring: a pass of the policy for features, say
        found = kept()
        time.sleep(waited)
        return found

    trainer.collect = slow  # type: ignore[method-assign]
    figures = trainer.train_step()
    parts = [figures[f"time/{part}"] for part in ("sample", "score", "update")]
    assert min(parts) > 0
    assert sum(parts) + waited <= figures["time/step"]
    assert figures["time/tokens_per_second"] == pytest.approx(figures["rollout/tokens"] / figures["time/step"])
    trainer.close()


def test_metrics_say_what_an_expert_asks_for_and_every_figure_is_finite(tmp_path: Path):
    task_model = f"model.path={warm_start(progress=False)}"
    config = run_config(
        tmp_path / "run", task_model, "sampling.samples_per_prompt=8", "sampling.max_completion_length=28"
    )
    trainer = Trainer(config)
    trainer.train()
    row = rows(trainer)[0]
    wanted = {
        *(f"reward/{name}" for name in ("observed", "true", "accuracy", "missing", "faults")),
        *(f"critic/{name}" for name in ("explained_variance", "calibration_error", "true_correlation", "value_error")),
        *(f"critic/{name}" for name in ("crossing_share", "head_disagreement", "grad_norm", "skipped_updates", "loss")),
        *(f"critic/{name}" for name in ("qr", "risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")),
        *(f"actor/{name}" for name in ("loss", "kl", "entropy", "clip_share", "grad_norm", "sampler_mismatch")),
        *(f"rollout/{name}" for name in ("tokens", "length", "truncated")),
    }
    assert wanted <= row.keys()
    assert all(isinstance(row[name], float) and math.isfinite(row[name]) for name in wanted)
    assert 0 < row["reward/true"] < 1
    assert -1 <= row["critic/true_correlation"] <= 1
    assert row["actor/skipped_updates"] == 0


def test_the_folder_holds_config_manifest_texts_faults_and_checkpoints_and_evaluations_where_asked(tmp_path: Path):
    settings = ["steps=4", "evaluation.every=2", "evaluation.samples=2", "checkpoint.every=1", "checkpoint.keep=2"]
    trainer = Trainer(run_config(tmp_path / "run", *settings, "log.completions=3"), task=Parity())
    evaluations = trainer.train()
    assert list(evaluations) == [0, 2, 4]
    assert {"eval/id/accuracy", "eval/ood/accuracy", "eval/id/pass@2", "eval/id/mean@2"} <= evaluations[4].keys()
    assert sorted(path.name for path in trainer.folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert (trainer.folder / "checkpoint-4" / "policy" / "model.safetensors").exists()
    assert (trainer.folder / "checkpoint-4" / "critic" / "critic.safetensors").exists()
    texts = rows(trainer, "completions")
    assert [row["step"] for row in texts] == [step for step in range(1, 5) for _ in range(3)]
    assert {"prompt_id", "visit", "sample", "prompt", "completion", "observed", "true"} <= texts[0].keys()
    assert (trainer.folder / "faults.jsonl").read_text() == ""
    manifest = json.loads((trainer.folder / "manifest.json").read_text())
    assert {"versions", "machine", "seed", "commit", "dirty", "config_hash"} <= manifest.keys()


def test_an_observer_hears_of_every_step_and_evaluation(tmp_path: Path):
    class Ear:
        def __init__(self) -> None:
            self.heard: list[tuple[str, int]] = []

        def on_rewards(self, step: int, faults: object, answers: int) -> None:
            assert (faults, answers) == ([], 6)
            self.heard.append(("rewards", step))

        def on_step(self, step: int, figures: dict[str, float]) -> None:
            self.heard.append(("step", step))

        def on_evaluation(self, step: int, figures: dict[str, float]) -> None:
            self.heard.append(("evaluation", step))

    ear = Ear()
    trained(tmp_path / "run", observer=ear)
    steps = [(what, step) for step in (1, 2) for what in ("rewards", "step")]
    assert ear.heard == [("evaluation", 0), *steps, ("evaluation", 2)]


def test_weights_that_are_not_finite_are_never_saved_over_sound_ones(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run", "checkpoint.every=1", "checkpoint.keep=1"), task=Parity())
    trainer.train_step()
    trainer.save()
    trainer.step = 2
    for module in (trainer.policy.model, trainer.critic):
        parameter = list(module.parameters())[-1]
        sound = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = math.nan
        trainer.save()
        with torch.no_grad():
            parameter.copy_(sound)
    trainer.close()
    assert [path.name for path in trainer.folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [row["kind"] for row in rows(trainer, "faults")] == ["non_finite_weights"] * 2


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path: Path):
    trainer = Trainer(run_config(tmp_path / "run"), task=Parity())
    before = weights(trainer)
    loss = trainer.row.critic_loss
    trainer.row = dataclasses.replace(trainer.row, critic_loss=lambda *given: {"loss": math.nan * loss(*given)["loss"]})
    figures = trainer.train_step()
    assert figures["critic/skipped_updates"] == 1
    assert figures["actor/skipped_updates"] == 0
    assert all(p.isfinite().all() for p in weights(trainer))
    critic = list(trainer.critic.parameters())
    assert farthest(before[-len(critic) :], critic) == 0
    trainer.close()


def test_the_trainer_tests_no_algorithms_name():
    source = Path(trainer_module.__file__).read_text()
    names = "|".join(map(re.escape, ALGORITHMS))
    assert re.findall(rf"[\"']({names})[\"']", source) == []
    assert "row.name" not in source


def test_the_policys_rate_is_logged_in_every_step_in_which_it_learns(tmp_path: Path):
    rising = ("policy_optimiser.lr=3e-3", "policy_optimiser.warmup_steps=3", "update.actor_warmup_steps=1")
    trainer = trained(tmp_path / "run", "algorithm=ppo", "steps=4", *rising)
    first, *rates = [row.get("actor/lr") for row in rows(trainer)]
    assert first is None
    assert rates == pytest.approx([2e-3, 3e-3, 3e-3])  # a third a step
