"""The loop a reader came for: collect -> estimate -> update -> log.

The trainer does not know the algorithms: a row of `dvpo.algorithms` says how advantages and targets are made and what
the losses are.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import set_seed

from dvpo.alarms import Alarms
from dvpo.batch import Estimates, Rollout
from dvpo.checkpoint import RNGState, load_state, restore
from dvpo.collect import Collected, Collector
from dvpo.config import Config, to_yaml
from dvpo.core.losses import kl_estimate
from dvpo.core.masks import masked_variance, whiten
from dvpo.core.returns import gae
from dvpo.critic import open_critic
from dvpo.critic_pass import CriticPass
from dvpo.distributed import (
    agreed,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    before_me,
    gather_rows,
    init_from_env,
    is_main,
    on_main,
    spread_from_main,
    together,
    world_size,
)
from dvpo.encoding import ChatEncoder, fit_prompts, within_context
from dvpo.errors import RunStoppedError
from dvpo.estimates import recentred
from dvpo.evaluate import Evaluation, evaluate, fitting_examples
from dvpo.faults import fault_figures, lost_in_evaluation, refuse_broken_reward, stop_at_faults
from dvpo.heap import keep_freed_memory
from dvpo.interrupt import Interrupted, check, deferred
from dvpo.keeper import Keeper, refuse_without_judge
from dvpo.kl import KLController
from dvpo.loading import suited_row
from dvpo.lora import Adapters, refuse_without_peft
from dvpo.metrics import (
    Means,
    critic_figures,
    mean_of,
    reward_figures,
    reward_reach,
    rollout_figures,
    signal_figures,
    task_figures,
)
from dvpo.noise import make_noise
from dvpo.noise_rates import open_rates
from dvpo.optimiser import Optimiser, warn_of_rate
from dvpo.parallel import refuse_processes, shard
from dvpo.policy import Policy, choose_device, open_policy
from dvpo.privilege import open_privilege
from dvpo.prompts import open_prompts, warn_of_few
from dvpo.replay import Replay
from dvpo.resume import find_checkpoint
from dvpo.rewards import Fault
from dvpo.risk_control import risk_figures
from dvpo.runlog import RunLog, refuse_used_folder
from dvpo.sampling import collate
from dvpo.scoring import Scorer, longest_scoring, open_reward
from dvpo.seeding import derive_seed
from dvpo.shaping import NO_RATES, going_on, response_penalties, step_signals
from dvpo.sinks import refuse_unusable
from dvpo.skips import Skips
from dvpo.tasks import Task
from dvpo.tasks.mixture import COLUMN, Mixture, held_out
from dvpo.tasks.named import make_task
from dvpo.token_view import token_rows
from dvpo.update import Learner
from dvpo.vllm_sampler import VllmSampler, open_sampler, refuse_absent_server
from dvpo.warmstart import starting_model
from dvpo.whole_copy import WholeCopy

REPLAY_FIGURES = ("loss", "skipped_updates")
"""Of the critic's update, logged for the replay apart: under `critic/` stands the step's own batch."""


class Observer(Protocol):
    """Whoever watches a run: a progress display, a test."""

    def on_rewards(self, step: int, faults: Sequence[Fault], answers: int) -> None: ...

    def on_step(self, step: int, figures: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, figures: dict[str, float]) -> None: ...


class Trainer(Learner):
    """Trains a policy (and its critic) as a config says.

    Args:
        config: see `dvpo.config`.
        task: instead of the one that `config.task` names.
        reward: a reward function (TRL's signature) instead of the one that `config.reward.function` names.
        resume: go on from the newest sound checkpoint in `config.output`.
        allow: settings or sections in which a resumed run may differ from its own config (`dvpo.resume`).
        observer: told about every step, what went wrong with its rewards, and every evaluation.

    Raises:
        InputError: anything wrong with config, model, data or reward function; nothing has been written then.
    """

    def __init__(
        self,
        config: Config,
        *,
        task: Task | None = None,
        reward: Callable[..., Any] | None = None,
        resume: bool = False,
        allow: Iterable[str] = (),
        observer: Observer | None = None,
    ) -> None:
        self.config, self.observer = config, observer
        self.row = suited_row(config)
        self.folder = Path(config.output)
        keep_freed_memory()
        patience = timedelta(seconds=config.distributed.patience + longest_scoring(config))
        self.device = init_from_env(choose_device(config.device), patience)
        refuse_processes(config)
        checkpoint = find_checkpoint(config, allow) if resume else None
        begun = resume and (self.folder / "manifest.json").exists()
        if not resume:
            refuse_used_folder(self.folder)  # now, not after minutes of loading a model
        on_main(lambda: refuse_unusable(config.log))
        refuse_without_peft(config.model.lora)
        refuse_absent_server(config.sampling)
        barrier()  # the main process writes there soon

        self.task = make_task(config.task) if task is None else task
        refuse_without_judge(config.checkpoint, self.task)
        train = self.task.split("train")
        warn_of_few(self.task.split("id"), config.task)
        self.reward = together(lambda: open_reward(config, self.task, reward, self.device))
        self.scorer = Scorer(self.task, self.reward, make_noise(config.noise, config.seed, train))
        source = starting_model(config)
        # A run with adapters goes on from the model that it began with: what it has trained is among its parts.
        trained = None if config.model.lora.rank else checkpoint
        learns = not config.model.lora.rank
        self.policy = self._open_start(source, learns) if trained is None else self._open(trained / "policy")
        warn_of_rate(self.policy.model, config)
        encoder = ChatEncoder(self.policy.tokenizer, self.policy.template)
        prompt_tokens = fit_prompts(train, encoder, config.sampling, self.policy.context_length)
        train = [example for example in train if example.id in prompt_tokens]
        self.reference = self._open_reference(source) if config.actor.kl.coef else None
        room = self.policy.context_length - config.sampling.max_completion_length
        self.privilege = open_privilege(config, encoder, train, prompt_tokens, room) if self.row.has_critic else None
        self.critic = open_critic(self.row.critic, config, self.policy, checkpoint)
        adapters = Adapters(config, source, self.policy.model, self.critic) if config.model.lora.rank else None
        self._spread()

        self.critic_pass = CriticPass(self.critic, self.policy, config) if self.critic else None
        self.prompts = open_prompts(self.task, train, config.seed)
        splits = held_out(self.task)
        self.judged_on = {split: fitting_examples(self.task, split, config, self.policy) for split in splits}
        self.rates = open_rates(config, self.task, train)
        self.policy_optimiser = Optimiser(self.policy.model, config.policy_optimiser, config.steps)
        self.critic_optimiser = Optimiser(self.critic, config.critic_optimiser, config.steps) if self.critic else None
        self.policy_version = 0
        drawing = self.whole_copy.policy if self.whole_copy else self.policy
        self.drawer = open_sampler(config.sampling, drawing, lambda: self.policy_version, self.folder)
        sampler = self.drawer(False)
        fitted = replace(config, sampling=within_context(config.sampling, self.policy.context_length))
        self.collector = Collector(self.task, self.prompts, prompt_tokens, encoder, sampler, self.scorer, fitted)
        self.kl = KLController(config.actor.kl)
        self.step = 0
        self.replay = Replay(config.critic.replay if self.critic else 0)
        self.skips, self.alarms = Skips(self.folder, config.update.max_skipped), Alarms(config.alarms)
        self.parts: dict[str, Any] = {"trainer": self, "prompts": self.prompts, "rng": RNGState()}
        optional = {
            "adapters": adapters,  # before the optimisers, which would not know another form when they see it
            "policy_optimiser": self.policy_optimiser,
            "critic_optimiser": self.critic_optimiser,
            "rates": self.rates,
            "kl": self.kl if self.kl.adaptive else None,
            "replay": self.replay if config.critic.replay else None,
        }
        self.parts |= {"skips": self.skips, "alarms": self.alarms}
        self.parts |= {name: part for name, part in optional.items() if part is not None}
        self.keeper = Keeper(self.folder, config.checkpoint, self.parts, self.policy, self.critic)
        if checkpoint is not None:
            restore(self.parts, load_state(checkpoint))
        self.keeper.mark(on_disk=checkpoint is not None)

        self.log = RunLog(
            self.folder,
            to_yaml(config),
            seed=config.seed,
            device=self.device,
            # -1: the run was killed before its first checkpoint and begins again in the same folder.
            resume_step=self.step if checkpoint else (-1 if begun else None),
            log=config.log,
            in_python={
                **({} if task is None else {"task": config.task.name}),
                **({} if reward is None else {"reward": config.reward.function}),
            },
        )

    # The run

    def train(self) -> dict[int, dict[str, float]]:
        """Run to the last step, with evaluations and checkpoints on the way.

        Returns:
            Step -> figures of the evaluations made by this call: before training, every `evaluation.every`, at the end.

        Raises:
            Interrupted: by a signal that `dvpo.interrupt` handles; a checkpoint holds what was done.
            RunStoppedError: at a bound or an alarm that the config says to stop at, after a checkpoint.
        """
        # Of several processes none stops where the others do not: a signal waits until all have been asked.
        with nullcontext() if world_size() == 1 else deferred():
            return self._train()

    def _train(self) -> dict[int, dict[str, float]]:
        evaluations = {}
        stepped = False
        try:
            while True:
                self._check()
                at_end = self.step == self.config.steps
                if self.keeper.evaluation_due(self.step, self.config.evaluation.every, at_end):
                    evaluations[self.step] = self.evaluate()
                    self._check()
                # What ended a run does not end its resumption before that has made a step.
                stop = (self.skips.reason_to_stop or self.alarms.reason_to_stop) if stepped else None
                if stop is not None and not at_end:
                    raise RunStoppedError(f"step {self.step}: {stop}; `--resume` goes on from {self.folder}")
                if self.keeper.checkpoint_due(self.step, at_end):
                    self.save()
                    self._check()
                if at_end:
                    return evaluations
                self.train_step()
                stepped = True
        except (Interrupted, RunStoppedError):
            if not self.keeper.on_disk:
                self.save()
            raise
        finally:
            self.close()

    def train_step(self) -> dict[str, float]:
        """One step: collect, estimate, update, log."""
        started = time.perf_counter()
        self.step += 1
        rollout, collected = self.collect()
        faults, sampled = collected.faults()
        self.log.faults(self.step, collected.fault_records())
        if self.step == 1:
            refuse_broken_reward(faults, sampled)
        stop_at_faults(faults, sampled, self.step, self.config.reward)
        if self.observer:
            self.observer.on_rewards(self.step, faults, sampled)
        self._check()
        scored = time.perf_counter()
        if self.critic_pass is not None:
            first = self._minibatches(rollout, "rows", self.step, 0)[0]
            self.critic_pass.expect(next(iter(self._cut(rollout, first)), first))
        estimates, figures = self.estimate(rollout)
        figures |= self.scorer.figures(all_reduce_sum)
        with deferred():  # weights change: a signal waits for the end of the step
            figures |= self.update(rollout, estimates) | self.update_from_replay()
            if self.step > self.config.update.actor_warmup_steps:  # a policy at rest says nothing of the coefficient
                self.kl.observe(figures.get("actor/kl_sampled", math.nan), self.config.sampling.responses_per_step)
            self.replay.add(rollout)
            ended = time.perf_counter()
            figures |= rollout_figures(rollout, len(collected.sampled), all_reduce_sum)
            if isinstance(self.task, Mixture):
                tasks = [episode.example.columns[COLUMN] for episode in collected.episodes]
                figures |= task_figures(self.task.parts, tasks, rollout.true_B, all_reduce_sum)
            figures |= {
                **fault_figures(faults),
                "time/sample": collected.sampling_seconds,
                "time/score": collected.scoring_seconds,
                "time/update": ended - scored,
                "time/step": ended - started,
                "time/tokens_per_second": figures["rollout/tokens"] / (ended - started),
            }
            if isinstance(self.collector.sampler, VllmSampler):
                figures |= self.collector.sampler.figures()
            figures |= self.alarms.on_step(self.step, figures, self.log.faults)
            self.log.metrics(self.step, figures)
            self.log.completions(self.step, collected.completions(self.config.log.completions))
            shown = token_rows(self.step, collected.episodes, rollout, estimates, self.collector.encoder, self.config)
            self.log.tokens(self.step, gather_rows(shown)[: self.config.log.tokens])
            if self.observer:
                self.observer.on_step(self.step, figures)
            self.keeper.judge_step(figures)
            self.keeper.mark()
        return figures

    def close(self) -> None:
        """Close the log and end the reward function's process."""
        self.log.close()
        if self.reward is not None:
            self.reward.close()
        if isinstance(self.collector.sampler, VllmSampler):
            self.collector.sampler.close()

    def _check(self) -> None:
        """Raise `Interrupted` if a signal has arrived, at any process."""
        check(None if world_size() == 1 else lambda number: int(all_reduce_max(torch.tensor(number))))

    # Collect

    def collect(self) -> tuple[Rollout, Collected]:
        """This process's share of the step's responses, each with its observed and (if it is known) true reward."""
        with self._whole_policy():
            collected = self.collector.collect()
        if self.rates:  # of all that was sampled: what was kept is chosen by its rewards
            fields = collected.scored.fields
            prompt_ids = [episode.example.id for episode in collected.sampled]
            self.rates.observe(prompt_ids, fields["observed_B"], fields["true_B"], all_reduce_sum)
        scored = collected.scored.select(collected.kept)
        rollout = collate(collected.episodes, scored.fields, self.policy.pad_id, self.policy_version)
        if self.privilege is not None:
            rollout = replace(rollout, hints_BH=self.privilege.hints(scored.believed))
        rollout = rollout.to(self.device)
        features = self.critic is not None and self.config.critic.features
        corrected = self.config.sampling.correction.kind != "off"
        if features or corrected:
            logprobs_BT, entropies_BT = self._token_figures(self.policy, rollout)
            if features:
                rollout = replace(rollout, entropies_BT=entropies_BT)
            if corrected:
                rollout = replace(rollout, old_logprobs_BT=logprobs_BT)
        return rollout, collected

    # Estimate

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> tuple[Estimates, dict[str, float]]:
        """Values, advantages and targets, once a step and before any update."""
        settings, kl = self.config.advantage, self.config.actor.kl
        rates = self.rates.rates() if self.rates else NO_RATES
        zeros_BT = torch.zeros_like(rollout.rewards_BT)
        reference_BT = self._token_figures(self.reference, rollout)[0] if self.reference else zeros_BT
        kl_BT = self.kl.coef * (rollout.old_logprobs_BT - reference_BT) if kl.place == "reward" else None
        values_BTNM, bootstrap_BNM = self._values(rollout)
        seed = derive_seed(self.config.seed, "targets", self.step)
        given = (rollout, values_BTNM, bootstrap_BNM, self.config, self.step, seed)
        signals = step_signals(*given, all_reduce_sum, rates, kl_BT)
        mask_BT, groups_B, counted_B = signals.mask_BT, signals.groups_B, signals.rewarded_B
        signals = replace(signals, tokens_before=before_me(int(mask_BT.sum())))
        if settings.recentre and self.critic is not None:
            signals = recentred(signals, self.row.value, going_on(rollout, settings), settings, all_reduce_sum)
        advantages_BT, targets_BTL = self.row.estimate(signals, self.config)
        spread = float(masked_variance(advantages_BT, mask_BT, all_reduce_sum).sqrt())
        if settings.whiten:
            advantages_BT = whiten(advantages_BT, mask_BT, all_reduce_sum)
        figures = reward_figures(rollout.observed_B, rollout.true_B, rollout.rewarded_B, groups_B, all_reduce_sum)
        stays_B = ~rollout.truncated_B | (settings.truncation != "mask")
        observed_B, true_B = (own_B.where(stays_B, torch.nan) for own_B in (rollout.observed_B, rollout.true_B))
        figures |= signal_figures(observed_B, true_B, groups_B, all_reduce_sum)
        figures["actor/advantage_std"] = spread
        if self.kl.adaptive:
            gaps_K = kl_estimate(rollout.old_logprobs_BT[mask_BT], reference_BT[mask_BT], "k3")
            figures |= {"actor/kl_sampled": mean_of(gaps_K, all_reduce_sum), "actor/kl_coef": self.kl.coef}
        if self.rates:
            figures |= self.rates.figures() | risk_figures(self.config, rates)
        if (penalties_B := response_penalties(rollout, self.config)) is not None:
            figures["reward/overlong"] = mean_of(penalties_B[counted_B], all_reduce_sum)
        if self.critic is not None:
            seen_BT = rollout.mask_BT & counted_B.unsqueeze(-1)
            _, returns_BT = gae(signals.rewards_BT, zeros_BT, rollout.mask_BT, settings.gamma, lam=1.0)
            truth_BT = rollout.true_B.unsqueeze(-1).expand_as(returns_BT)
            figures |= critic_figures(values_BTNM, returns_BT, truth_BT, seen_BT, all_reduce_sum)
            figures["actor/reward_reach"] = reward_reach(mask_BT, settings.gamma * settings.lam, all_reduce_sum)
        return Estimates(mask_BT, advantages_BT, targets_BTL, values_BTNM, reference_BT), figures

    def _values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Predictions at every token's state, and at the state after the last token: [B, T, N, M], [B, N, M]."""
        if self.critic is None:
            empty = rollout.rewards_BT.new_zeros(*rollout.mask_BT.shape, 0, 0)
            return empty, empty[:, 0]
        assert self.critic_pass is not None
        self.critic.learn_verdict_alone(self.step <= self.config.critic.verdict_only_steps)
        return self.critic_pass.values(rollout)

    # Update (an optimiser step: `dvpo.update`)

    def update_from_replay(self) -> dict[str, float]:
        """One pass of the critic over the responses of each step in the replay, with targets made anew."""
        means = Means()
        for age, kept in enumerate(self.replay):
            rollout = kept.to(self.device)
            estimates, _ = self.estimate(rollout)
            for rows in self._minibatches(rollout, "replay", self.step, age):
                self._update_critic(rollout, estimates, rows, means)
        figures = means.result(all_reduce_sum, agreed)
        return {f"replay/{name}": figures[f"critic/{name}"] for name in REPLAY_FIGURES if f"critic/{name}" in figures}

    # Judge, save, log

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the held-out splits; logs and returns `eval/<split>/<figure>`."""
        figures: dict[str, float] = {}
        faults: list[dict[str, Any]] = []
        for split in held_out(self.task):
            result = self.evaluate_split(split)
            figures |= {f"eval/{split}/{name}": value for name, value in result.summary.items()}
            faults += [{"split": split, **row} for row in result.faults]
        if is_main() and (said := lost_in_evaluation(faults)):
            warnings.warn(f"evaluation at step {self.step}: {said}; all of them: faults.jsonl", stacklevel=2)
        with deferred():
            if figures:  # a task may hold nothing out
                self.log.metrics(self.step, figures)
            self.log.faults(self.step, faults)
            self.alarms.on_evaluation(self.step, figures, self.log.faults)
            self.keeper.judge_evaluation(self.step, figures)
            self.keeper.mark()
        if self.observer:
            self.observer.on_evaluation(self.step, figures)
        return figures

    def evaluate_split(self, split: str) -> Evaluation:
        """Evaluate on the first `evaluation.prompts` examples of a split."""
        config, judge, samples = self.config, self.scorer.judge, self.config.evaluation.samples
        with self._whole_policy() as policy:
            return evaluate(
                policy, self.task, self.judged_on[split], judge, config.sampling, samples, config.seed, self.drawer
            )

    def save(self) -> None:
        """Write the state between two steps, unless a weight is NaN or infinite: a sound one must not make room."""
        with deferred():
            self.log.sync()  # a resume from this checkpoint needs the rows up to it
            if self.keeper.save() is None:
                self.log.faults(self.step, [{"kind": "non_finite_weights", "message": "checkpoint not written"}])
            barrier()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "policy_version": self.policy_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.policy_version = state["step"], state["policy_version"]

    # Set-up

    def _spread(self) -> None:
        """Make the models equal on all processes, and of sharded ones leave each process its share."""
        models = [part.model for part in (self.policy, self.reference) if part is not None]
        modules = dict.fromkeys([*models, *([] if self.critic is None else [self.critic])])  # one may be two
        for module in modules:
            spread_from_main([*module.parameters(), *module.buffers()])
        self.whole_copy = None
        if self.config.distributed.strategy == "fsdp":
            self.whole_copy = WholeCopy(self.policy, self.device)
            for module in modules:
                offload = self.config.distributed.cpu_offload
                shard(module, self.device, self.policy.dtype, offload, root_dtype=module is not self.critic)
            self.policy = replace(self.policy, home=self.device)
            self.reference = self.reference and replace(self.reference, home=self.device)

    def _whole_policy(self) -> AbstractContextManager[Policy]:
        """The policy to sample from, where every process goes its own way."""
        return nullcontext(self.policy) if self.whole_copy is None else self.whole_copy.filled()

    def _open_start(self, source: str | Path, learns: bool = True) -> Policy:
        """The policy before training; weights and heads, and whatever a task draws, follow the run's seed."""
        set_seed(self.config.seed)
        return self._open(source, self.config.model.weights, learns)

    def _open_reference(self, source: str | Path) -> Policy:
        return replace(self.policy, adapted=False) if self.config.model.lora.rank else self._open_start(source, False)

    def _open(
        self, source: str | Path, weights: Literal["pretrained", "random"] = "pretrained", learns: bool = True
    ) -> Policy:
        model = self.config.model
        # What is to be sharded is opened in host memory: whole, it may not fit the device.
        device = torch.device("cpu") if self.config.distributed.strategy == "fsdp" else self.device
        return open_policy(source, device, model.dtype, model.gradient_checkpointing, weights, model.template, learns)
