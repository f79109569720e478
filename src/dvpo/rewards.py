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
The function runs in a process of its own, since a thread cannot be stopped. State that it keeps in globals
lives until a time-out or a crash, then a fresh process imports it again.
"""

import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

import cloudpickle

from dvpo import reward_worker
from dvpo.errors import InputError
from dvpo.tasks import Completion, Message, Prompt, Reward

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")

TIMEOUTS_IN_A_ROW = 3
"""After so many samples in a row that timed out alone, the rest of the batch is not tried."""
RETRY_TIME_LIMITS = 10
"""The retries of one batch may take this many time limits together, whatever the pattern of its faults."""

FaultKind = Literal["exception", "timeout", "non_finite", "wrong_length", "wrong_type", "worker_died"]


@dataclass(frozen=True)
class Fault:
    """Something that went wrong with one sample's reward; the sample's reward is None, never 0."""

    kind: FaultKind
    index: int | None
    """The sample's place in the batch; None for a fault of the batch that no sample shows when alone."""
    message: str
    """What happened; for an exception the last lines of its traceback."""


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

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...


class GuardedReward:
    """A user's reward function behind a guard: no fault of it hangs or ends the run, or counts as a 0.

    A batch is sent in one call. If that call raises, times out or kills the process, each sample is tried alone, so
    that only the guilty ones lose their reward; a fault that no sample shows alone is reported once, with index None,
    and the rewards found one by one are kept. A function that compares the completions of a batch sees a single one in
    such a retry. An answer that is no list with one entry a completion costs every sample of the batch its reward:
    nobody can tell which entry was meant for whom.

    Args:
        function: `"my_module:my_function"`, imported in the worker with the working directory and `path` on
            `sys.path`, or a callable, sent by cloudpickle.
        timeout: seconds for one call of the function, on the whole batch or on one sample.
        start_timeout: seconds for a fresh process to import the function (which may load a model).
        columns: the names of the data set's columns, if known: then the whole signature is checked at once.
        path: further folders to import from.
        field: the config field that an InputError names.

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
    ) -> None:
        self.name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
        self._field, self._timeout, self._start_timeout = field, timeout, start_timeout
        self._function = self._transportable(function)
        self._directory = os.getcwd()
        self._sys_path = [*map(str, path), self._directory, *sys.path]
        self._worker: _Worker | None = None
        self.signature = self.check(columns)

    def check(self, columns: Iterable[str] | None = None) -> str:
        """Import the function in the worker, have it match the arguments, and return its signature."""
        names = [] if columns is None else list(columns)
        if clash := sorted(set(names) & set(STANDARD_ARGUMENTS)):
            raise InputError(
                f"{self._field}: the data set has a column {clash[0]!r}, the name of another argument that "
                f"every reward function gets; rename the column"
            )
        arguments = [*STANDARD_ARGUMENTS, *names]
        request = {"request": "check", "arguments": arguments, "complete": columns is not None}
        reply = self._prepare(self._running_worker(), request)
        if "refusal" in reply:
            raise self._input_error(
                f"has the signature {reply['signature']} and cannot be called with the arguments "
                f"{', '.join(arguments)} ({reply['refusal']})",
                "write it as f(prompts, completions, completion_ids, **columns)",
            )
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
        outcome = self._ask(batch, size) if size else []
        if isinstance(outcome, list):
            return _scores(outcome)
        if outcome.kind in ("wrong_length", "wrong_type"):
            # Not retried: a function that returns one entry for eight would return one for one, and pass.
            return _scores([outcome] * size)
        return self._one_by_one(batch, outcome, size) if size > 1 else _scores([outcome])

    def close(self) -> None:
        """End the worker and whatever it started; a later call would start another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _one_by_one(self, batch: Mapping[str, Sequence[Any]], failure: "_Failure", size: int) -> Scores:
        outcomes: list[Any] = []
        deadline = time.monotonic() + RETRY_TIME_LIMITS * self._timeout
        timeouts = 0
        for index in range(size):
            if timeouts == TIMEOUTS_IN_A_ROW or time.monotonic() > deadline:
                outcomes.append(_Failure("timeout", "not tried: those before it took the time of the batch"))
                continue
            outcome = self._ask({name: values[index : index + 1] for name, values in batch.items()}, 1)
            outcomes.append(outcome[0] if isinstance(outcome, list) else outcome)
            timeouts = timeouts + 1 if isinstance(outcome, _Failure) and outcome.kind == "timeout" else 0
        scores = _scores(outcomes)
        if not any(isinstance(outcome, _Failure) for outcome in outcomes):
            scores.faults.insert(0, Fault(failure.kind, None, failure.message))
        return scores

    def _ask(self, arguments: Mapping[str, Sequence[Any]], size: int) -> "list[Any] | _Failure":
        """One call of the function: its raw entries, or why there are none."""
        request = {"request": "call", "arguments": self._pickled(arguments)}
        try:
            reply = self._running_worker().exchange(request, self._timeout)
        except InputError as error:  # it could be imported when the run began
            return _Failure("worker_died", f"a fresh process could not be started: {error}")
        except TimeoutError:
            self.close()
            return _Failure("timeout", f"no answer within {self._timeout:g} s")
        except _WorkerDiedError as error:
            self.close()
            return _Failure("worker_died", str(error))
        if "error" in reply:
            return _Failure("exception", str(reply["traceback"]))
        if "wrong_type" in reply:
            return _Failure("wrong_type", f"returned {reply['wrong_type']}, not a list with one entry a completion")
        entries = list(reply["rewards"])
        if len(entries) != size:
            return _Failure("wrong_length", f"returned {len(entries)} entries for {size} completions")
        return entries

    def _running_worker(self) -> "_Worker":
        if self._worker is None:
            self._worker = worker = _Worker(self._directory)
            request = {"request": "load", "function": self._function, "sys_path": self._sys_path}
            self._prepare(worker, request)
        return self._worker

    def _prepare(self, worker: "_Worker", request: dict[str, Any]) -> dict[str, Any]:
        """Have the worker do what precedes all rewards: what fails here, the user can mend."""
        try:
            reply = worker.exchange(request, self._start_timeout)
        except (TimeoutError, _WorkerDiedError) as error:
            self.close()
            raise self._input_error(
                f"could not be imported ({str(error) or f'no end within {self._start_timeout:g} s'})",
                "import it in a Python shell to see why",
            ) from None
        if "error" in reply:
            self.close()
            raise self._input_error(
                f"could not be imported ({reply['error']})",
                f"name it module:function, the module being importable from {self._directory}",
            )
        return reply

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

    def _pickled(self, arguments: Mapping[str, Sequence[Any]]) -> bytes:
        try:
            return cloudpickle.dumps(dict(arguments))
        except Exception as error:
            columns = sorted(set(arguments) - set(STANDARD_ARGUMENTS))
            raise self._input_error(
                f"runs in a process that the data set's columns {columns} cannot be sent to ({error})",
                "keep columns to numbers, strings, lists and mappings",
            ) from error

    def _input_error(self, problem: str, remedy: str) -> InputError:
        return InputError(f"{self._field}: {self.name!r} {problem}; {remedy}")


class _Failure(NamedTuple):
    """Why a call has no rewards to show."""

    kind: FaultKind
    message: str


class _WorkerDiedError(Exception):
    """The worker process ended, or said something unreadable."""


class _Worker:
    """One worker process in a session of its own, and the conversation with it; see `dvpo.reward_worker`."""

    def __init__(self, directory: str) -> None:
        lifeline, held = os.pipe()  # never written to: it closes when this process dies, however it dies
        self._process = subprocess.Popen(
            [sys.executable, "-P", reward_worker.__file__, str(lifeline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=directory,
            pass_fds=(lifeline,),
            start_new_session=True,
        )
        os.close(lifeline)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        # Called by hand, when this object is forgotten, or when the interpreter ends: whichever comes first.
        self.kill = weakref.finalize(self, _kill_group, self._process, held, os.getpid())

    def exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and return the reply; TimeoutError when so many seconds have passed."""
        deadline = time.monotonic() + seconds
        try:
            self._send(reward_worker.frame(pickle.dumps(request)), deadline)
            size = int.from_bytes(self._receive(reward_worker.HEADER_BYTES, deadline), "big")
            reply: dict[str, Any] = json.loads(self._receive(size, deadline))
        except (EOFError, BrokenPipeError):
            raise _WorkerDiedError(f"the process ended by {_manner_of_death(self.kill())}") from None
        except ValueError as error:
            raise _WorkerDiedError(f"the process sent an unreadable reply ({error})") from None
        return reply

    def _send(self, message: bytes, deadline: float) -> None:
        rest = memoryview(message)
        while rest:
            _wait(self._requests, select.POLLOUT, deadline)
            rest = rest[os.write(self._requests, rest) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            _wait(self._replies, select.POLLIN, deadline)
            part = os.read(self._replies, min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _kill_group(process: "subprocess.Popen[bytes]", lifeline: int, owner: int) -> int | None:
    """Kill the worker with everything it started, and return its exit code.

    The group is killed before the worker is reaped: until then nobody else can be given its number.
    """
    if os.getpid() != owner:  # a fork of this process comes to its end: the worker is its parent's
        return None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    os.close(lifeline)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    return code


def _manner_of_death(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _as_trl_passes_it(prompt: Prompt, completion: str | Sequence[Message]) -> str | Sequence[Message]:
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _scores(outcomes: Sequence[Any]) -> Scores:
    """Read the raw entries: None where there is no reward, with a fault unless the function meant it."""
    rewards: list[Reward] = []
    faults: list[Fault] = []
    for index, outcome in enumerate(outcomes):
        reward, failure = _read_list(outcome) if isinstance(outcome, list) else _read(outcome)
        rewards.append(reward)
        if failure is not None:
            faults.append(Fault(failure.kind, index, failure.message))
    return Scores(rewards, faults)


def _read_list(entries: list[Any]) -> tuple[Reward, _Failure | None]:
    """One entry a turn or a token: a bad one is missing, the others stand; the first fault speaks for all."""
    read = [_read(entry) for entry in entries]
    return [reward for reward, _ in read], next((failure for _, failure in read if failure), None)


def _read(entry: Any) -> tuple[float | None, _Failure | None]:
    if isinstance(entry, _Failure):
        return None, entry
    if entry is None:
        return None, None
    if not isinstance(entry, float):
        name = entry["wrong_type"] if isinstance(entry, dict) else "list"
        return None, _Failure("wrong_type", f"returned {name} where a number or None was expected")
    if math.isnan(entry):
        return None, None
    if math.isinf(entry):
        return None, _Failure("non_finite", f"returned {entry}")
    return entry, None
