"""From finished episodes to rewards: the truth where it is known, what was observed, and where each lands."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dvpo.config import Config
from dvpo.core.masks import Reduce
from dvpo.errors import InputError
from dvpo.noise import NO_NOISE, Columns, Noise
from dvpo.policy import choose_device
from dvpo.reward_lane import Failure
from dvpo.reward_mix import Part, RewardMix
from dvpo.reward_model import ModelReward, open_reward_model
from dvpo.rewards import Fault, GuardedReward, RewardSource, Scores, longest_call
from dvpo.sampling import Episode, pad_right
from dvpo.tasks import Completion, Reward, Task, total

MODEL_PREFIX = "path:"
"""Behind it `reward.function` names the folder of a reward model."""
MATH_VERIFY = "dvpo.math_answers:math_verify"
"""What `reward.function: math_verify` is."""
LARGEST = torch.finfo(torch.float32).max
"""Rewards are trained on in float32."""


@dataclass(frozen=True)
class Scored:
    """Rewards of a step's episodes, ready for `collate`."""

    fields: dict[str, Tensor]
    """`rewards_BT`, `rewarded_B`, `observed_B`, `true_B` of the rollout."""
    faults: list[Fault]
    believed: Columns
    """The columns as whoever observes the rewards knows them: with the answers of pseudo-labels, right or wrong."""

    def select(self, rows: Sequence[int]) -> "Scored":
        """The given rows, in that order; faults keep their old indices."""
        index = torch.tensor(rows)
        fields = {name: values[index] for name, values in self.fields.items()}
        return Scored(fields, self.faults, {name: [values[i] for i in rows] for name, values in self.believed.items()})


def join(parts: Sequence[Scored]) -> Scored:
    """Several lots of episodes as one, in that order; a fault's index counts through all of them."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.fields["rewards_BT"].shape[1] for part in parts)
    sizes = [len(part.fields["rewarded_B"]) for part in parts]
    firsts = list(accumulate(sizes, initial=0))[:-1]

    def field(name: str) -> Tensor:
        lots = [part.fields[name] for part in parts]
        return torch.cat([pad(lot, (0, width - lot.shape[1])) if name.endswith("_BT") else lot for lot in lots])

    def column(name: str) -> list[Any]:
        lots = [part.believed.get(name, [None] * size) for part, size in zip(parts, sizes, strict=True)]
        return [value for lot in lots for value in lot]

    return Scored(
        fields={name: field(name) for name in parts[0].fields},
        faults=[
            fault if fault.index is None else replace(fault, index=first + fault.index)
            for part, first in zip(parts, firsts, strict=True)
            for fault in part.faults
        ],
        believed={name: column(name) for name in sorted({name for part in parts for name in part.believed})},
    )


class Scorer:
    """Truth from the task, observation from the user's reward functions or the task, noise on top."""

    def __init__(self, task: Task, reward: RewardSource | RewardMix | None, noise: Noise = NO_NOISE) -> None:
        self.task, self.reward, self.noise = task, reward, noise
        self._names = {name for example in task.split("train") for name in example.columns}
        """Every call has all columns of the data, also one whose samples lack some: functions name what they need."""

    def __call__(self, episodes: Sequence[Episode]) -> Scored:
        columns, prompt_ids = self._columns(episodes), [e.example.id for e in episodes]
        truth = self.true_rewards(episodes, columns)
        believed = self.noise.relabelled(columns, prompt_ids)
        clean, faults = self._judged(episodes, truth, columns, believed)
        observed = self.noise(
            clean,
            prompt_ids,
            [e.visit for e in episodes],
            [e.sample for e in episodes],
            [e.tokens for e in episodes],
        )
        placed, unplaced = _placed(observed, episodes)
        rewards = [[0.0] * len(e.tokens) if p is None else p for p, e in zip(placed, episodes, strict=True)]
        rewarded = [p is not None for p in placed]
        width = max(len(e.tokens) for e in episodes)
        fields = {
            "rewards_BT": pad_right(rewards, 0.0, torch.float32, width),
            "rewarded_B": torch.tensor(rewarded),
            "observed_B": torch.tensor([sum(r) if ok else math.nan for r, ok in zip(rewards, rewarded, strict=True)]),
            "true_B": torch.tensor([math.nan if p is None else sum(p) for p in _placed(truth, episodes)[0]]),
        }
        return Scored(fields, _broken_off(episodes) + faults + unplaced, believed)

    def judge(self, episodes: Sequence[Episode]) -> Scores:
        """Rewards for an evaluation: the truth; of a task that knows none, the reward function without noise.

        A task that knows the truth (`knows_truth`, true unless it says otherwise) is never judged by anything else,
        even if all of it is missing; of a mix that knows it in part, the reward judges the responses without. What
        training could not place is unknown here too, with the same fault.
        """
        truth = self.true_rewards(episodes, self._columns(episodes))
        scores = Scores(truth, [])
        if self.reward is not None and not getattr(self.task, "knows_truth", True):
            unknown = [i for i, reward in enumerate(truth) if math.isnan(total(reward))]
            asked = self._judged_by_reward(self.reward, [episodes[i] for i in unknown])
            given = dict(zip(unknown, asked.rewards, strict=True))
            faults = [
                fault if fault.index is None else replace(fault, index=unknown[fault.index]) for fault in asked.faults
            ]
            scores = Scores([given.get(i, reward) for i, reward in enumerate(truth)], faults)
        placed, unplaced = _placed(scores.rewards, episodes)
        rewards = [None if p is None else reward for p, reward in zip(placed, scores.rewards, strict=True)]
        return Scores(rewards, [*_broken_off(episodes), *scores.faults, *unplaced])

    def _judged_by_reward(self, reward: RewardSource | RewardMix, episodes: Sequence[Episode]) -> Scores:
        """By the reward without noise, of episodes whose truth is unknown."""
        if not episodes:
            return Scores([], [])
        columns = self._columns(episodes)
        if isinstance(reward, RewardMix):
            return reward(self._parts(reward, episodes, [None] * len(episodes), columns))
        return self._ask(reward, episodes, columns)

    def _columns(self, episodes: Sequence[Episode]) -> dict[str, list[Any]]:
        """The data set's further columns, as one list each; None where an example lacks one."""
        names = sorted(self._names.union(*(e.example.columns for e in episodes)))
        return {name: [e.example.columns.get(name) for e in episodes] for name in names}

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """What is to be logged of a mix's parts since the last call; nothing of a single reward."""
        return self.reward.figures(reduce) if isinstance(self.reward, RewardMix) else {}

    def _judged(
        self, episodes: Sequence[Episode], truth: list[Reward], columns: Columns, believed: Columns
    ) -> tuple[list[Reward], list[Fault]]:
        """The rewards as whoever observes them would give them by the columns that are believed."""
        if self.reward is not None and not isinstance(self.reward, RewardMix):
            scores = self._ask(self.reward, episodes, believed)
            return scores.rewards, list(scores.faults)
        by_the_task = truth if believed is columns else self.true_rewards(episodes, believed)
        if self.reward is None:
            return by_the_task, []
        parts = self._parts(self.reward, episodes, by_the_task, believed)
        self.reward.observe(parts)
        mixed = self.reward(parts)
        return mixed.rewards, mixed.faults

    def _parts(
        self, mix: RewardMix, episodes: Sequence[Episode], by_the_task: list[Reward], columns: Columns
    ) -> list[Scores]:
        """What each part says. Functions run in processes of their own, so that nobody waits for the sum of them."""
        functions = [part.source for part in mix.parts if isinstance(part.source, GuardedReward)]
        with ThreadPoolExecutor(max(len(functions), 1)) as threads:
            try:
                asked = {source: threads.submit(self._ask, source, episodes, columns) for source in functions}
                return [
                    Scores(by_the_task, []) if part.source is None
                    else asked[part.source].result() if isinstance(part.source, GuardedReward)
                    else self._ask(part.source, episodes, columns)
                    for part in mix.parts
                ]  # fmt: skip
            except BaseException:  # Ctrl-C, say: without their workers the threads end at once
                for source in functions:
                    source.interrupt()
                raise

    def _ask(self, reward: RewardSource, episodes: Sequence[Episode], columns: Columns) -> Scores:
        completions: list[Completion] = [e.text if isinstance(e.example.prompt, str) else e.messages for e in episodes]
        scores = reward(
            [e.example.prompt for e in episodes],
            completions,
            [e.tokens for e in episodes],
            columns,
        )
        rewards = [None if e.fault else given for given, e in zip(scores.rewards, episodes, strict=True)]
        return Scores(rewards, scores.faults)

    def true_rewards(self, episodes: Sequence[Episode], columns: Columns) -> list[Reward]:
        """The task's verdict on the final text, together with what the environment gave turn by turn."""
        final = self.task.true_reward(
            [e.example.prompt for e in episodes],
            [e.text for e in episodes],
            [e.tokens for e in episodes],
            **columns,
        )
        return [None if e.fault else _with_turns(reward, e) for reward, e in zip(final, episodes, strict=True)]


def open_reward(
    config: Config, task: Task, function: Callable[..., Any] | None = None, device: torch.device | None = None
) -> RewardSource | RewardMix | None:
    """The reward function, reward model or mix of a run, opened and checked; None where the task itself judges.

    Args:
        config: names it under `reward`.
        task: its training split tells which columns the function will be given.
        function: instead of the named one.
        device: where a reward model works; None: as the config says.

    Raises:
        InputError: it cannot be opened or called with the columns, or nobody knows a reward.
    """
    if not task.split("train"):
        raise InputError(f"task.name = {config.task.name}: its training split is empty, give it at least one example")
    if not config.reward.mix:
        name = config.reward.function if function is None else function
        source = open_source(config, task, name, "reward.function", device)
        _refuse_idle_concurrency(config, [source])
        return source
    if function is not None:
        raise InputError("reward.mix and a reward function given in Python exclude each other: keep one of them")
    parts: list[Part] = []
    try:
        for place, part in enumerate(config.reward.mix):
            source = open_source(config, task, part.function, f"reward.mix.{place}.function", device)
            parts.append(Part(part.label, part.weight, source))
        _refuse_idle_concurrency(config, [part.source for part in parts])
    except InputError:
        RewardMix(parts).close()
        raise
    return RewardMix(parts)


def longest_scoring(config: Config) -> float:
    """Seconds that the rewards of one call may take at most; starting workers anew is not counted."""
    reward, sampling, evaluation = config.reward, config.sampling, config.evaluation
    step = sampling.responses_per_step
    calls = math.ceil(max(step, evaluation.prompts * max(evaluation.samples, 1)) / step) * max(len(reward.mix), 1)
    # Of a mix the async functions alone are called side by side.
    ways = {reward.concurrency, 0} if reward.mix else {reward.concurrency}
    return calls * max(longest_call(step, reward.timeout, concurrency, reward.retries) for concurrency in ways)


def _refuse_idle_concurrency(config: Config, sources: Sequence[RewardSource | None]) -> None:
    functions = [source for source in sources if isinstance(source, GuardedReward)]
    if config.reward.concurrency and not any(function.concurrency for function in functions):
        for function in functions:
            function.close()
        asked = ", ".join(function.name for function in functions) or "what knows the rewards here, no function"
        raise InputError(
            f"reward.concurrency = {config.reward.concurrency} is for `async def` functions, and there is none among "
            f"{asked}: set it to 0, or write one so"
        )


def open_source(
    config: Config, task: Task, name: str | Callable[..., Any], field: str, device: torch.device | None = None
) -> RewardSource | None:
    """Whoever observes one reward, whether or not `reward.concurrency` is for it; None: the task."""
    examples = task.split("train")
    if name == "math_verify":
        if importlib.util.find_spec("math_verify") is None:
            raise InputError(f"{field} = math_verify needs the extra math: pip install 'dvpo[math]'")
        name = MATH_VERIFY
    if isinstance(name, str) and name.startswith(MODEL_PREFIX):
        where = torch.device(choose_device(config.device)) if device is None else device
        model = open_reward_model(name.removeprefix(MODEL_PREFIX), where, config.model.dtype, learns=False)
        model.encode(examples[0].prompt, "")  # a chat template that is missing shows now
        return ModelReward(model)
    if name != "task":
        columns = {column for example in examples for column in example.columns}
        return GuardedReward(
            name,
            timeout=config.reward.timeout,
            columns=sorted(columns),
            field=field,
            workers=config.reward.workers,
            concurrency=config.reward.concurrency,
            retries=config.reward.retries,
            most=config.sampling.responses_per_step,  # an evaluation has more, and the limit is that of a step's call
        )
    # A probe would not tell: a verifier may well have no opinion of an empty answer.
    if not getattr(task, "knows_truth", True):
        raise InputError(
            f"{field} = task, but the task {task.name} cannot judge an answer: set {field} to "
            "my_module:my_function or path:FOLDER of a reward model"
        )
    return None


def place(reward: Reward, episode: Episode) -> list[float] | Failure | None:
    """Spread a reward over the response's tokens.

    A number lands on the last policy token; a list with one entry a turn on the last policy token of each turn; a
    list with one entry a token where it says.

    Returns:
        One number a token; None where supervision is missing (one missing entry leaves the whole return unknown); or
        what is wrong: an infinity (in float32, the sum included), a list of another length, or a reward at a token that
        the policy did not write.
    """
    last = {turn: i for i, turn in enumerate(episode.turns)}
    last_of_turn = [last[turn] for turn in range(max(episode.turns) + 1)]
    values = reward if isinstance(reward, list) else [reward]
    if any(v is None or math.isnan(v) for v in values):
        return None
    numbers = [float(v) for v in values if v is not None]
    if endless := [number for number in (*numbers, sum(numbers)) if abs(number) > LARGEST]:
        return Failure("non_finite", f"a reward is {endless[0]:g}: it must be finite, in float32 (below 3.4e38)")
    out = [0.0] * len(episode.tokens)
    if not isinstance(reward, list):
        out[last_of_turn[-1]] = numbers[0]
    elif len(numbers) == len(last_of_turn):
        for i, number in zip(last_of_turn, numbers, strict=True):
            out[i] = number
    elif len(numbers) == len(episode.tokens):
        if any(n and t < 0 for n, t in zip(numbers, episode.turns, strict=True)):
            said = "a reward stands at a token of the environment: rewards belong to the policy's tokens"
            return Failure("wrong_length", said)
        out = numbers
    else:
        return Failure(
            "wrong_length",
            f"a list of {len(numbers)} rewards fits neither the {len(last_of_turn)} turns "
            f"nor the {len(episode.tokens)} tokens of the response",
        )
    return out


def _placed(rewards: Sequence[Reward], episodes: Sequence[Episode]) -> tuple[list[list[float] | None], list[Fault]]:
    """Each reward at its tokens, None where it is missing or cannot be placed, which is a fault."""
    placed = [place(reward, episode) for reward, episode in zip(rewards, episodes, strict=True)]
    faults = [Fault(one.kind, i, one.message) for i, one in enumerate(placed) if isinstance(one, Failure)]
    return [None if isinstance(one, Failure) else one for one in placed], faults


def _broken_off(episodes: Sequence[Episode]) -> list[Fault]:
    return [Fault("exception", i, e.fault) for i, e in enumerate(episodes) if e.fault]


def _with_turns(final: Reward, episode: Episode) -> Reward:
    if all(reward is None for reward in episode.turn_rewards):
        return final
    turns = [reward or 0.0 for reward in episode.turn_rewards]
    turns[-1] += total(final) if final is not None else 0.0
    return list(turns)
