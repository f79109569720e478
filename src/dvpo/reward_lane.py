"""One lane to a user's reward function: at most one worker process at a time, asked, watched, killed, started anew.

The worker's side is `dvpo.reward_worker`. Whatever the function does ends here, as entries or as a `Failure`.
"""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from dvpo import reward_worker

FaultKind = Literal["exception", "timeout", "non_finite", "wrong_length", "wrong_type", "worker_died", "output_flood"]

OUTPUT_BYTES = 1 << 16
"""So much of what a function prints during one call is passed on to stderr; the rest is dropped."""
REPLY_BYTES, REPLY_BYTES_PER_SAMPLE, REPLY_BYTES_PER_TOKEN = 1 << 20, 1 << 13, 32
"""A reply may be so long: a traceback a sample and a number a token fit in well."""
LONGEST_POLL = 3600.0
"""Seconds: poll takes 24.8 days at most."""


class Failure(NamedTuple):
    """Why a call, or one sample of it, has no reward to show."""

    kind: FaultKind
    message: str


class NotImportedError(Exception):
    """A fresh worker could not import the function; the text says why, `remedy` what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


class Lane:
    """A place for one worker, which is started when it is needed.

    Args:
        function: `module:function`, or a callable as cloudpickle wrote it.
        directory: the worker's working directory.
        sys_path: the worker's `sys.path`.
        timeout: seconds for one call of the function.
        start_timeout: seconds for a fresh process to import the function.
    """

    def __init__(
        self,
        function: str | bytes,
        directory: str,
        sys_path: Sequence[str],
        timeout: float,
        start_timeout: float,
    ) -> None:
        self._load = {"request": "load", "function": function, "sys_path": list(sys_path)}
        self._directory, self._timeout, self._start_timeout = directory, timeout, start_timeout
        self._worker: _Worker | None = None
        self._interrupted = False

    def check(self, arguments: Sequence[str], complete: bool) -> dict[str, Any]:
        """Import the function and say whether it takes the arguments; see `reward_worker.RewardProcess.check`."""
        request = {"request": "check", "arguments": list(arguments), "complete": complete}
        return self._prepare(self._running_worker(), request)

    def ask(self, arguments: bytes, token_counts: Sequence[int], concurrency: int = 0) -> list[Any] | Failure:
        """One call for a batch: for each sample its raw entry or its `Failure`; or why there is no answer at all.

        Args:
            arguments: keyword arguments of the function, pickled.
            token_counts: of each completion.
            concurrency: calls of an async function at a time, one a sample; 0 = one call for the batch.
        """
        if self._interrupted:
            return Failure("worker_died", "not tried: the run was interrupted")
        size, seconds = len(token_counts), self._timeout
        request: dict[str, Any] = {"request": "call", "arguments": arguments}
        if concurrency:
            request |= {"request": "call_each", "concurrency": concurrency, "seconds": seconds}
            seconds *= -(-size // concurrency) + 0.5  # half a limit more, so that the samples' own come first
        limit = REPLY_BYTES + REPLY_BYTES_PER_SAMPLE * size + REPLY_BYTES_PER_TOKEN * sum(token_counts)
        try:
            reply = self._running_worker().exchange(request, seconds, limit)
        except NotImportedError as error:  # it could be imported when the run began
            return Failure("worker_died", f"a fresh process could not be started: {error}")
        except TimeoutError:
            self._end()
            return Failure("timeout", f"no answer within {seconds:g} s")
        except OSError as error:
            self._end()
            return Failure("worker_died", f"no process for it: {error}")
        except _FloodError as error:
            self._end()
            return Failure("output_flood", str(error))
        except _WorkerDiedError as error:
            self._end()
            return Failure("worker_died", str(error))
        if "each" not in reply:
            return _entries(reply, size, self._timeout)
        answers = [_entries(one, 1, self._timeout) for one in reply["each"]]
        return [answer if isinstance(answer, Failure) else answer[0] for answer in answers]

    def interrupt(self) -> None:
        """From another thread: kill the worker, so that `ask` comes to its end, and take no more calls."""
        self._interrupted = True
        if (worker := self._worker) is not None:  # its own thread may drop it meanwhile
            worker.signal()

    def close(self) -> None:
        """End the worker and whatever it started; a later call would start another."""
        self._interrupted = False
        self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.drain()
            self._worker.kill()
            self._worker = None

    def _running_worker(self) -> "_Worker":
        if self._worker is None:
            self._worker = worker = _Worker(self._directory)
            if self._interrupted:  # between the first look and the start
                worker.signal()
            self._prepare(worker, self._load)
        return self._worker

    def _prepare(self, worker: "_Worker", request: dict[str, Any]) -> dict[str, Any]:
        """Have the worker do what precedes all rewards: what fails here, the user can mend."""
        try:
            reply = worker.exchange(request, self._start_timeout, REPLY_BYTES)
        except (TimeoutError, _WorkerDiedError) as error:
            self._end()
            raise NotImportedError(
                str(error) or f"no end within {self._start_timeout:g} s", "import it in a Python shell to see why"
            ) from None
        if "error" in reply:
            self._end()
            raise NotImportedError(
                str(reply["error"]), f"name it module:function, the module being importable from {self._directory}"
            )
        return reply


def _entries(reply: dict[str, Any], size: int, timeout: float) -> list[Any] | Failure:
    """What one call of the function came to: an entry a sample, or why there is none."""
    if "timeout" in reply:
        return Failure("timeout", f"no answer within {timeout:g} s")
    if "error" in reply:
        return Failure("exception", str(reply["traceback"]))
    if "wrong_type" in reply:
        return Failure("wrong_type", f"returned {reply['wrong_type']}, not a list with one entry a completion")
    entries = list(reply["rewards"])
    if len(entries) != size:
        return Failure("wrong_length", f"returned {len(entries)} entries for {size} completions")
    return entries


class _WorkerDiedError(Exception):
    """The worker process ended, or said something unreadable."""


class _FloodError(_WorkerDiedError):
    """The worker's reply is longer than any sensible one."""


class _Worker:
    """One worker process in a session of its own, and the conversation with it; see `dvpo.reward_worker`."""

    def __init__(self, directory: str) -> None:
        lifeline, held = os.pipe()  # never written to: it closes when this process dies, however it dies
        self._process = subprocess.Popen(
            [sys.executable, "-P", reward_worker.__file__, str(lifeline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=directory,
            pass_fds=(lifeline,),
            start_new_session=True,
        )
        os.close(lifeline)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._output, self._allowance = self._process.stderr.fileno(), OUTPUT_BYTES
        self._number = 0
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        for pipe in (self._requests, self._replies, self._output):
            os.set_blocking(pipe, False)
        # Called by hand, when this object is forgotten, or when the interpreter ends: whichever comes first.
        self.kill = weakref.finalize(self, _kill_group, self._process, held, os.getpid())

    def exchange(self, request: dict[str, Any], seconds: float, limit: int) -> dict[str, Any]:
        """Send a request and return the reply, of at most `limit` bytes; TimeoutError after so many seconds."""
        deadline, self._allowance = time.monotonic() + seconds, OUTPUT_BYTES
        self._number += 1
        try:
            self._send(reward_worker.frame(pickle.dumps({**request, "number": self._number})), deadline)
            size = int.from_bytes(self._receive(reward_worker.HEADER_BYTES, deadline), "big")
            if size > limit:
                raise _FloodError(f"a reply of {size:,} bytes, where {limit:,} are more than enough")
            reply = json.loads(self._receive(size, deadline))
            # A function may write into the pipe itself: without the number, the next call would read this one's reply.
            if not isinstance(reply, dict) or reply.get("number") != self._number:
                raise ValueError("to no request of ours")
        except (EOFError, BrokenPipeError):
            self.drain()
            raise _WorkerDiedError(f"the process ended by {_manner_of_death(self.kill())}") from None
        except (ValueError, RecursionError) as error:
            raise _WorkerDiedError(f"the process sent an unreadable reply ({error})") from None
        return reply

    def signal(self) -> None:
        """Kill the process group, and leave it to the thread that talks to it to notice."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def drain(self) -> None:
        """Pass on what was printed and not yet read."""
        if self.kill.alive:
            with suppress(BlockingIOError):
                while self._allowance > 0 and self._pass_on():
                    pass

    def _send(self, message: bytes, deadline: float) -> None:
        rest = memoryview(message)
        while rest:
            self._wait(self._requests, select.POLLOUT, deadline)
            rest = rest[os.write(self._requests, rest) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(self._replies, select.POLLIN, deadline)
            part = os.read(self._replies, min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        """Return when the pipe is ready; pass on what the function prints meanwhile."""
        self._poll.register(pipe, event)
        try:
            while True:
                rest = deadline - time.monotonic()
                ready = [at for at, _ in self._poll.poll(min(max(0.0, rest), LONGEST_POLL) * 1000)]
                if self._output in ready and not self._pass_on():
                    self._poll.unregister(self._output)  # closed: it would be ready for ever
                if pipe in ready:
                    return
                if rest <= 0:  # also if it prints and prints, and poll always finds something
                    raise TimeoutError
        finally:
            self._poll.unregister(pipe)

    def _pass_on(self) -> int:
        """Copy a piece of the output to our own stderr, as far as the allowance of this call goes."""
        piece = os.read(self._output, 1 << 16)
        if self._allowance > 0:
            shown = piece[: self._allowance]
            if len(piece) > self._allowance:
                shown += b"\n[the reward function prints more than is shown]\n"
            with suppress(OSError):
                os.write(2, shown)
        self._allowance -= len(piece)
        return len(piece)


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
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    return code


def _manner_of_death(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
