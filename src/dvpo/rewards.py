"""The guarded call of a user's reward function: it can hang, crash or return nonsense, and the run goes on.

A reward function has TRL's signature, sync or `async def`:

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

- `prompts`: what the data set holds, a string or a message list each.
- `completions`: a string for each string prompt; for each message-list prompt a list with one message,
  `[{"role": "assistant", "content": "..."}]`, as TRL passes it (multi-turn episodes: all their messages).
- `completion_ids`: the sampled token ids, a list of ints each.
- `columns`: every further column of the data set, as a list with one entry a completion.

Each entry of the answer is a number, None or NaN ("no opinion"), or a list of those: one a turn, or one a
token (whether such a list is as long as the turns or tokens is for the caller to check, who knows them).
The function runs in processes of its own, since a thread cannot be stopped. State that it keeps in globals
lives until a time-out or a crash, then a fresh process imports it again.
"""

import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, Self

import cloudpickle

from dvpo.errors import InputError
from dvpo.reward_lane import Failure, FaultKind, Lane, NotImportedError
from dvpo.tasks import Completion, Message, Prompt, Reward

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")

TIMEOUTS_IN_A_ROW = 3
"""After so many samples in a row that timed out alone, the rest of the batch is not tried."""
RETRY_TIME_LIMITS = 10
"""The retries of one batch may take this many time limits together, whatever the pattern of its faults."""

ALONE = 8
"""A batch of so many is tried sample by sample after a failure; a larger one in halves."""

FORM = ("wrong_length", "wrong_type")
"""Not tried again: a function that returns one entry for eight would return one for one, and pass."""

HEADLINE_CHARACTERS = 300

NOT_TRIED = Failure("timeout", "not tried: those before it took the time of the batch")

Batch = Mapping[str, Sequence[Any]]
"""Keyword arguments of the function, each with one entry a sample."""


@dataclass(frozen=True)
class Fault:
    """Something that went wrong with one sample's reward; unless it was cured the reward is None, never 0."""

    kind: FaultKind
    index: int | None
    """The sample's place in the batch; None for a fault of the batch that no sample shows when alone."""
    message: str
    """What happened; an exception in one line, then the last lines of its traceback."""
    cured: bool = False
    """A later attempt gave the reward."""


def headline(fault: Fault) -> str:
    """What happened in one line: an exception with the user's file and line, else the kind and what it came with."""
    text = fault.message.splitlines()[0] if fault.message else "no message"
    half = HEADLINE_CHARACTERS // 2
    text = text if len(text) <= HEADLINE_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
    return text if fault.kind == "exception" else f"{fault.kind}: {text}"


@dataclass(frozen=True)
class Scores:
    """One reward a sample, and what went wrong on the way."""

    rewards: list[Reward]
    faults: list[Fault]


class RewardSource(Protocol):
    """Whatever observes rewards: the guarded call below, or a reward model in this process."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores: ...

    def close(self) -> None: ...


class GuardedReward:
    """A user's reward function behind a guard: no fault of it hangs or ends the run, or counts as a 0.

    A batch is sent in one call. If that call raises, kills the process or floods it, its halves are tried, down to
    `ALONE` samples, which are tried one by one, as are those of a call that timed out: only the guilty ones lose their
    reward. A fault that no sample shows alone is reported with index None, and the rewards that were found are kept. A
    function that compares the completions of a batch sees fewer, or one, in such a retry. An answer that is no list
    with one entry a completion costs every sample of the call its reward: nobody can tell which was meant for whom.

    Args:
        function: `"my_module:my_function"`, imported in the worker with the working directory and `path` on
            `sys.path`, or a callable, sent by cloudpickle.
        timeout: seconds for one call of the function, on the whole batch or on one sample.
        start_timeout: seconds for a fresh process to import the function (which may load a model).
        columns: the names of the data set's columns, if known: then the whole signature is checked at once.
        path: further folders to import from.
        field: the config field that an InputError names.
        workers: processes that share a batch; the completions of one prompt stay together.
        concurrency: > 0: an async function is called for each sample by itself, so many calls at a time, each with
            the time limit to itself; 0, and a function that is not async: one call for the batch.
        retries: further attempts for a sample that raised, timed out or killed its process when it was alone.
        most: samples of one call, about; a larger batch is several calls, each with the time limit to itself. None:
            all are one call.

    Raises:
        InputError: the function cannot be imported or sent, or does not accept the arguments.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        timeout: float = 30.0,
        start_timeout: float = 120.0,
        columns: Iterable[str] | None = None,
        path: Sequence[str] = (),
        field: str = "reward.function",
        workers: int = 1,
        concurrency: int = 0,
        retries: int = 0,
        most: int | None = None,
    ) -> None:
        self._most = most
        self.name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
        self._field, self._timeout = field, timeout
        self.concurrency, self._retries = concurrency, retries
        sent, directory = self._transportable(function), os.getcwd()
        sys_path = [*map(str, path), directory, *sys.path]
        self._lanes = [Lane(sent, directory, sys_path, timeout, start_timeout) for _ in range(workers)]
        self.signature = self.check(columns)

    def check(self, columns: Iterable[str] | None = None) -> str:
        """Import the function in the first worker, have it match the arguments, and return its signature."""
        names = [] if columns is None else list(columns)
        if clash := sorted(set(names) & set(STANDARD_ARGUMENTS)):
            raise InputError(
                f"{self._field}: the data set has a column {clash[0]!r}, the name of another argument that "
                f"every reward function gets; rename the column"
            )
        arguments = [*STANDARD_ARGUMENTS, *names]
        try:
            reply = self._lanes[0].check(arguments, complete=columns is not None)
        except NotImportedError as error:
            raise self._input_error(f"could not be imported ({error})", error.remedy) from None
        if "refusal" in reply:
            raise self._input_error(
                f"has the signature {reply['signature']} and cannot be called with the arguments "
                f"{', '.join(arguments)} ({reply['refusal']})",
                _meant(reply["refusal"], names) + "write it as f(prompts, completions, completion_ids, **columns)",
            )
        if not reply["is_async"]:
            self.concurrency = 0
        return str(reply["signature"])

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores:
        """Score one batch: all arguments hold one entry a sample, and so does the answer."""
        batch: dict[str, Sequence[Any]] = {
            "prompts": prompts,
            "completions": [_as_trl_passes_it(p, c) for p, c in zip(prompts, completions, strict=True)],
            "completion_ids": completion_ids,
            **columns,
        }
        size = len(prompts)
        if unequal := [name for name, values in batch.items() if len(values) != size]:
            raise ValueError(f"{size} prompts, but {len(batch[unequal[0]])} entries in {unequal[0]!r}")
        cuts = [*_cuts(prompts, math.ceil(size / (self._most or max(size, 1)))), size]
        return _joined([self._call(_select(batch, range(start, end))) for start, end in pairwise(cuts)])

    def _call(self, batch: Batch) -> Scores:
        """One call, which the workers share."""
        cuts = [*_cuts(batch["prompts"], len(self._lanes)), len(batch["prompts"])]
        parts = [_select(batch, range(start, end)) for start, end in pairwise(cuts)]
        return _joined([self._score(self._lanes[0], parts[0])] if len(parts) == 1 else self._score_side_by_side(parts))

    def interrupt(self) -> None:
        """End the workers in the middle of a call, from another thread than the call's."""
        for lane in self._lanes:
            lane.interrupt()

    def close(self) -> None:
        """End the workers and whatever they started; a later call would start others."""
        for lane in self._lanes:
            lane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_side_by_side(self, parts: Sequence[Batch]) -> list[Scores]:
        """A part a worker. The threads only wait for the workers' pipes."""
        with ThreadPoolExecutor(len(parts)) as threads:
            try:
                return list(threads.map(self._score, self._lanes, parts))
            except BaseException:  # Ctrl-C, say: without their workers the threads end at once
                self.interrupt()
                raise

    def _score(self, lane: Lane, batch: Batch, deadline: float | None = None) -> Scores:
        """One call for all; then what failed again, as far as that can help and until the deadline."""
        size = len(batch["prompts"])
        if deadline is not None and time.monotonic() > deadline:
            return _scores([NOT_TRIED] * size, {})
        answer = self._ask(lane, batch)
        if isinstance(answer, list):
            # Single samples fail only where every one had a call of its own: then the next round is as wide.
            return self._again_side_by_side(lane, batch, answer)
        if answer.kind in FORM or (size == 1 and not self._retries):
            return _scores([answer] * size, {})
        deadline = time.monotonic() + RETRY_TIME_LIMITS * self._timeout if deadline is None else deadline
        if size <= ALONE or answer.kind == "timeout":  # to find one that hangs by halves costs a limit each
            return self._one_by_one(lane, batch, answer, deadline)
        halves = range(size // 2), range(size // 2, size)
        scores = _joined([self._score(lane, _select(batch, half), deadline) for half in halves])
        if not scores.faults:
            scores.faults.append(Fault(answer.kind, None, answer.message, cured=True))
        return scores

    def _again_side_by_side(self, lane: Lane, batch: Batch, outcomes: list[Any]) -> Scores:
        failed: dict[int, Failure] = {}
        for _ in range(self._retries):
            pending = [i for i, outcome in enumerate(outcomes) if _may_be_cured(outcome)]
            if not pending:
                break
            failed |= {i: outcomes[i] for i in pending}
            answer = self._ask(lane, _select(batch, pending))
            entries = answer if isinstance(answer, list) else [answer] * len(pending)
            for i, entry in zip(pending, entries, strict=True):
                outcomes[i] = entry
        return _scores(outcomes, failed)

    def _one_by_one(self, lane: Lane, batch: Batch, failure: Failure, deadline: float) -> Scores:
        size = len(batch["prompts"])
        outcomes: list[Any] = []
        failed: dict[int, Failure] = {} if size > 1 else {0: failure}
        timeouts = 0
        for index in range(size):
            if timeouts == TIMEOUTS_IN_A_ROW or time.monotonic() > deadline:
                outcomes.append(NOT_TRIED)
                continue
            alone = _select(batch, [index])
            for _ in range(self._retries + (size > 1)):
                answer = self._ask(lane, alone)
                outcome = answer[0] if isinstance(answer, list) else answer
                if not _may_be_cured(outcome):
                    break
                failed[index] = outcome
            outcomes.append(outcome)
            timeouts = timeouts + 1 if isinstance(outcome, Failure) and outcome.kind == "timeout" else 0
        scores = _scores(outcomes, failed)
        if not failed and not any(isinstance(outcome, Failure) for outcome in outcomes):
            scores.faults.insert(0, Fault(failure.kind, None, failure.message, cured=True))
        return scores

    def _ask(self, lane: Lane, batch: Batch) -> list[Any] | Failure:
        return lane.ask(self._pickled(batch), [len(ids) for ids in batch["completion_ids"]], self.concurrency)

    def _transportable(self, function: str | Callable[..., Any]) -> str | bytes:
        if not isinstance(function, str):
            try:
                return cloudpickle.dumps(function)
            except Exception as error:
                raise self._input_error(
                    f"cannot be sent to the process it would run in ({error})", "name it as module:function"
                ) from error
        module, _, attribute = function.partition(":")
        if not (module and all(part.isidentifier() for part in f"{module}.{attribute}".split("."))):
            raise self._input_error("is no name of a function", "write it as module:function")
        return function

    def _pickled(self, batch: Batch) -> bytes:
        try:
            return cloudpickle.dumps(dict(batch))
        except Exception as error:
            columns = sorted(set(batch) - set(STANDARD_ARGUMENTS))
            raise self._input_error(
                f"runs in a process that the data set's columns {columns} cannot be sent to ({error})",
                "keep columns to numbers, strings, lists and mappings",
            ) from error

    def _input_error(self, problem: str, remedy: str) -> InputError:
        return InputError(f"{self._field}: {self.name!r} {problem}; {remedy}")


def _meant(refusal: str, columns: Sequence[str]) -> str:
    """A hint where the argument that is missing has nearly the name of a column."""
    missing = re.search(r"missing a required (?:keyword-only )?argument: '(\w+)'", refusal)
    near = difflib.get_close_matches(missing[1], columns, n=1) if missing else []
    return f"did you mean {near[0]!r}, a column of your file? " if near else ""


def longest_call(samples: int, timeout: float, concurrency: int, retries: int) -> float:
    """Seconds after which `GuardedReward` has given up whatever it could not get, its workers' starts not counted."""
    if concurrency:
        return timeout * (1 + retries) * (math.ceil(samples / concurrency) + 0.5)
    # The batch, the retries one by one, and those of the sample that was begun just before their time was over.
    return timeout * (1 + RETRY_TIME_LIMITS + 1 + retries)


def _joined(parts: Sequence[Scores]) -> Scores:
    """Parts of a batch one behind the other, as one."""
    rewards: list[Reward] = []
    faults: list[Fault] = []
    for scores in parts:
        faults += [replace(f, index=None if f.index is None else len(rewards) + f.index) for f in scores.faults]
        rewards += scores.rewards
    return Scores(rewards, faults)


def _cuts(prompts: Sequence[Prompt], parts: int) -> list[int]:
    """Where at most so many parts begin, of about equal size; the completions of one prompt are never divided."""
    starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
    wanted = [len(prompts) * part / parts for part in range(parts)] if starts else []
    return sorted({min(starts, key=lambda start: abs(start - place)) for place in wanted})


def _select(batch: Batch, indices: Sequence[int]) -> Batch:
    return {name: [values[i] for i in indices] for name, values in batch.items()}


def _as_trl_passes_it(prompt: Prompt, completion: str | Sequence[Message]) -> str | Sequence[Message]:
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _may_be_cured(outcome: Any) -> bool:
    return isinstance(outcome, Failure) and outcome.kind not in FORM


def _scores(outcomes: Sequence[Any], failed: Mapping[int, Failure]) -> Scores:
    """Read the raw entries: None where there is no reward, with a fault unless the function meant it.

    Args:
        outcomes: for each sample its raw entry, or why there is none.
        failed: the last failure of samples that were tried again: cured, unless the outcome is one too.
    """
    rewards: list[Reward] = []
    faults: list[Fault] = []
    for index, outcome in enumerate(outcomes):
        reward, failure = _read_list(outcome) if isinstance(outcome, list) else _read(outcome)
        rewards.append(reward)
        if failure is not None:
            faults.append(Fault(failure.kind, index, failure.message))
        elif index in failed:
            faults.append(Fault(failed[index].kind, index, failed[index].message, cured=True))
    return Scores(rewards, faults)


def _read_list(entries: list[Any]) -> tuple[Reward, Failure | None]:
    """One entry a turn or a token: a bad one is missing, the others stand; the first fault speaks for all."""
    read = [_read(entry) for entry in entries]
    return [reward for reward, _ in read], next((failure for _, failure in read if failure), None)


def _read(entry: Any) -> tuple[float | None, Failure | None]:
    if isinstance(entry, Failure):
        return None, entry
    if entry is None:
        return None, None
    if not isinstance(entry, float):
        name = entry["wrong_type"] if isinstance(entry, dict) else "list"
        return None, Failure("wrong_type", f"returned {name} where a number or None was expected")
    if math.isnan(entry):
        return None, None
    if math.isinf(entry):
        return None, Failure("non_finite", f"returned {entry}")
    return entry, None
