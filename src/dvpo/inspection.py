"""`dvpo inspect`: one response under a checkpoint's critic, token by token, in the terminal and as a page."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from dvpo.algorithms import Algorithm, find_algorithm
from dvpo.batch import Estimates, Rollout
from dvpo.checkpoint import checkpoint_step
from dvpo.config import Config
from dvpo.core.masks import identity
from dvpo.critic import Critic
from dvpo.encoding import ChatEncoder
from dvpo.environments import EnvironmentFaultError, environment_at, step
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.policy import Policy
from dvpo.privilege import Privilege
from dvpo.report import write_page
from dvpo.report_data import Run
from dvpo.report_texts import page_data, script_json
from dvpo.sampling import Episode, HuggingFaceSampler, collate, play
from dvpo.scoring import Scorer
from dvpo.seeding import derive_seed
from dvpo.shaping import Rates, step_signals
from dvpo.tasks import Example, SingleTurn, Task
from dvpo.tasks.named import make_task
from dvpo.token_terminal import print_view
from dvpo.token_view import token_row
from dvpo.trained import open_trained, open_trained_critic, refuse_what_python_gave, sound_checkpoint
from dvpo.valuation import with_features


@dataclass(frozen=True)
class Question:
    """What the checkpoint is asked."""

    prompt: str | None = None
    """A prompt of the user's; None: an example of the task."""
    split: str = "id"
    row: int = 0
    """The example's place in that split."""
    response: str | None = None
    """Looked at instead of a sampled one."""
    reward: float | None = None
    """Of the response, where the task does not know it."""
    greedy: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """A checkpoint, opened."""

    folder: Path
    config: Config
    policy: Policy
    critic: Critic | None
    task: Task

    @property
    def algorithm(self) -> Algorithm:
        return find_algorithm(self.config.algorithm)

    @property
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(self.policy.tokenizer, self.policy.template)


def inspect_checkpoint(
    source: str, question: Question, colour: str, compare: str | None, html: str | None, console: Console
) -> None:
    """Show a response under one checkpoint, or the same response under two.

    Args:
        source: a run folder (its newest sound checkpoint is taken) or a `checkpoint-N` folder.
        question: what to look at.
        colour: figure that colours the tokens: advantages, value or width.
        compare: a second checkpoint, whose critic reads the response of the first.
        html: a page to write.
        console: where to print.

    Raises:
        InputError: no checkpoint, no such example, a prompt or response that does not fit, two tokenizers, a task that
            was given in Python.
    """
    folders = [sound_checkpoint(each) for each in (source, compare) if each]  # before any model is opened
    subjects = [open_subject(folder) for folder in folders]
    for subject in subjects if question.prompt is None else ():
        refuse_what_python_gave(subject.folder, subject.config, "task")
    if html and Path(html).suffix != ".html":  # now, not after the model has spoken
        raise InputError(f"--html = {html} is no name for a page: let it end in .html")
    first = subjects[0]
    if any(other.policy.tokenizer.get_vocab() != first.policy.tokenizer.get_vocab() for other in subjects[1:]):
        raise InputError(f"--compare = {compare} has another tokenizer: compare checkpoints of one model")
    example = find_example(first, question)
    episode = answered(first, example, question)
    runs = [look(subject, example, episode, question) for subject in subjects]
    for run in runs:
        print_view(console, run.tokens[0], f"{run.name}, checkpoint {run.tokens[0]['step']}", colour)
        if why := run.tokens[0].get("unweighed"):
            console.print(Text(f"no advantages: {why}", style="dim"))
    if html:
        data = page_data(runs)
        page = {"title": f"Inspection of {first.folder.name}", "data": Markup(script_json(data))}
        console.print(f"page: {write_page(Path(html), 'inspect.html', page)}", soft_wrap=True)


def open_subject(source: str | Path) -> Subject:
    """Open a checkpoint with its run's config, its policy, its critic if it has one, and its task."""
    folder = sound_checkpoint(source)
    config = load_config(folder.parent / "config.yaml")
    policy = open_trained(folder, config)
    has_critic = find_algorithm(config.algorithm).has_critic
    critic = open_trained_critic(folder, policy) if has_critic else None
    return Subject(folder, config, policy, critic, make_task(config.task))


def find_example(subject: Subject, question: Question) -> Example:
    """The example that is asked for, or one made of the user's prompt."""
    if question.prompt is not None:
        if subject.config.critic.privileged and subject.critic is not None:
            raise InputError(
                f"--prompt has no column {subject.config.critic.privileged}, which this critic reads "
                "(critic.privileged): take an example of the task by --row"
            )
        plain = subject.policy.tokenizer.chat_template is None
        return Example("of your own", question.prompt if plain else [{"role": "user", "content": question.prompt}])
    examples = subject.task.split(question.split)
    if not 0 <= question.row < len(examples):
        raise InputError(
            f"--row = {question.row}: split {question.split} of task {subject.task.name} has {len(examples)} examples, "
            "counted from 0"
        )
    return examples[question.row]


def answered(subject: Subject, example: Example, question: Question) -> Episode:
    """The example with the given response, or with one that the policy draws."""
    settings, encoder = subject.config.sampling, subject.encoder
    with environment_at(example):
        environment = SingleTurn(example) if question.prompt is not None else subject.task.environment(example)
        prompt = environment.reset()
    episode = Episode(example, visit=0, sample=0, prompt_tokens=encoder.prompt(prompt))
    room = subject.policy.context_length - len(episode.prompt_tokens)
    if question.response is None:
        limit = min(settings.max_completion_length, room)
        _check_room(limit, 1)
        sampler = HuggingFaceSampler(subject.policy, settings, greedy=question.greedy)
        short = replace(settings, max_completion_length=limit)
        play([episode], [environment], sampler, encoder, short, derive_seed(question.seed, "inspect"))
        if episode.fault:
            raise EnvironmentFaultError(episode.fault)
        return episode
    tokens = encoder.plain(question.response)
    _check_room(room, max(len(tokens), 1))
    if not tokens:
        raise InputError("--response is empty: give a text, or leave it out to have one sampled")
    episode.tokens, episode.turns, episode.logprobs = tokens, [0] * len(tokens), [0.0] * len(tokens)
    episode.messages.append({"role": "assistant", "content": question.response})
    episode.turn_rewards.append(step(environment, example, question.response).reward)
    episode.terminated = True
    return episode


def _check_room(room: int, needed: int) -> None:
    if room < needed:
        raise InputError(
            f"prompt and response need more than the model's context ({needed} tokens where {max(room, 0)} are left): "
            "shorten them"
        )


@torch.no_grad()
def look(subject: Subject, example: Example, episode: Episode, question: Question) -> Run:
    """What a checkpoint thinks of a response, as a run with one row of tokens."""
    rollout = _rollout(subject, example, episode, question)
    estimates = _estimates(subject, rollout)
    row = token_row(0, episode, rollout, estimates, subject.encoder, subject.config.critic)
    if why := _unweighed(subject, rollout):
        del row["advantages"]
        row["unweighed"] = why
    home, algorithm = subject.folder.absolute().parent.name, subject.config.algorithm
    return Run(
        name=algorithm if algorithm == home else f"{algorithm} of {home}",
        seed=subject.config.seed,
        folder=subject.folder,
        settings={},
        tokens=[{"step": checkpoint_step(subject.folder), **row}],
    )


def _rollout(subject: Subject, example: Example, episode: Episode, question: Question) -> Rollout:
    """The response with its reward (the task's, or the given one) and all that the critic reads."""
    width = len(episode.tokens)
    if question.reward is not None or question.prompt is not None:
        reward = float("nan") if question.reward is None else question.reward
        last = max(index for index, turn in enumerate(episode.turns) if turn >= 0)
        rewards_BT = torch.zeros(1, width)
        rewards_BT[0, last] = 0.0 if question.reward is None else reward
        known = torch.tensor([question.reward is not None])
        fields = {"rewards_BT": rewards_BT, "rewarded_B": known, "observed_B": torch.tensor([reward]),
                  "true_B": torch.tensor([float("nan")])}  # fmt: skip
    else:
        fields = Scorer(subject.task, None)([episode]).fields
    rollout = collate([episode], fields, subject.policy.pad_id, policy_version=0)
    settings = subject.config
    if settings.critic.privileged and subject.critic is not None:
        room = subject.policy.context_length - len(episode.prompt_tokens) - width
        privilege = Privilege(settings.critic.privileged, subject.encoder, [example], room)
        columns = {name: [value] for name, value in example.columns.items()}
        rollout = replace(rollout, hints_BH=privilege.hints(columns))
    rollout = rollout.to(subject.policy.device)
    if not settings.critic.features:
        return rollout
    return with_features(rollout, subject.policy, settings.sampling.temperature)


def _estimates(subject: Subject, rollout: Rollout) -> Estimates:
    """Values, and the advantages of the algorithm's row, before whitening: one response has no batch."""
    zeros_BT = torch.zeros_like(rollout.rewards_BT)
    if subject.critic is None:
        empty = zeros_BT.new_zeros(*zeros_BT.shape, 0, 0)
        return Estimates(rollout.mask_BT, zeros_BT, zeros_BT.new_zeros(*zeros_BT.shape, 0), empty, zeros_BT)
    states_BUD = subject.critic.states(rollout, subject.policy)
    temperature = subject.config.sampling.temperature
    values_BUNM = subject.critic.values(states_BUD, rollout, subject.policy, temperature)
    config, step = subject.config, max(checkpoint_step(subject.folder), 1)
    rates = Rates(config.reward.rates.false_positive or 0.0, config.reward.rates.false_negative or 0.0)
    seed = derive_seed(config.seed, "inspect")
    signals = step_signals(rollout, values_BUNM[:, :-1], values_BUNM[:, -1], config, step, seed, identity, rates)
    advantages_BT, targets_BTL = subject.algorithm.estimate(signals, config)
    return Estimates(rollout.mask_BT, advantages_BT, targets_BTL, values_BUNM[:, :-1], zeros_BT)


def _unweighed(subject: Subject, rollout: Rollout) -> str | None:
    """Why there are no advantages: the critic's values are of what the run learnt from, which one response lacks."""
    reward, advantage, kl = subject.config.reward, subject.config.advantage, subject.config.actor.kl
    if subject.critic is None:
        return "without a critic they come from a group, and this response is alone"
    if not rollout.rewarded_B.any():
        return "the response has no reward"
    if reward.norm != "none":
        return f"reward.norm = {reward.norm} takes the returns of other responses"
    if reward.trusted and (reward.correction != "none" or advantage.law.functional == "denoised"):
        return "the noise's rates, which a reward is corrected by, are estimated in the run (reward.trusted)"
    if advantage.recentre:
        return "the values are recentred (advantage.recentre) by the responses of a step"
    if kl.coef and kl.place == "reward":
        return "the KL penalty in the reward (actor.kl.place) takes the starting policy"
    if advantage.truncation == "mask" and rollout.truncated_B.any():
        return "a response that the length limit cut leaves the step (advantage.truncation = mask)"
    return None
