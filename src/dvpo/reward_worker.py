"""The process in which a user's reward function runs; `dvpo.rewards` starts it, talks to it and kills it.

It is run by its path and imports nothing but the standard library, so that it starts in a tenth of a second
and nothing of the caller's (no `__main__`, no torch) is imported a second time. Requests are pickles,
because the worker trusts its parent; replies are JSON, because the parent does not trust a process that
runs a stranger's code. A message is eight bytes of length, big-endian, and then the payload.
"""

import asyncio
import fcntl
import importlib
import inspect
import json
import numbers
import operator
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

HEADER_BYTES = 8
TRACEBACK_LINES, TRACEBACK_CHARACTERS, EXCEPTION_CHARACTERS = 8, 4000, 2000
STANDARD_LIBRARY = os.path.dirname(os.__file__)

Json = dict[str, Any]


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


class RewardProcess:
    """The worker's side of the conversation: one method for each kind of request."""

    def __init__(self) -> None:
        self._function: Callable[..., Any] | None = None
        self._runner = asyncio.Runner()  # one event loop for all calls: an HTTP client kept by the user stays usable

    def answer(self, request: Json) -> Json:
        try:
            return getattr(self, request.pop("request"))(**request)
        except BaseException as error:  # a user's sys.exit() is a fault of one call, not the end of the worker
            return {"error": one_line(error), "traceback": _told(error)}

    def load(self, function: str | bytes, sys_path: list[str]) -> Json:
        """Import `module:function`, or unpickle what cloudpickle made of a callable."""
        sys.path[:] = sys_path
        self._function = pickle.loads(function) if isinstance(function, bytes) else _imported(function)
        if not callable(self._function):
            raise TypeError(f"a {type(self._function).__name__} is no function")
        return {}

    def check(self, arguments: Sequence[str], complete: bool) -> Json:
        """Would the function accept these keyword arguments? `complete`: nothing else will be passed."""
        assert self._function is not None
        try:
            signature = inspect.signature(self._function)
        except (TypeError, ValueError):  # builtins and some C functions have none
            return {"signature": "(...)", "is_async": False}
        found: Json = {"signature": str(signature), "is_async": _is_async(self._function)}
        try:
            (signature.bind if complete else signature.bind_partial)(**dict.fromkeys(arguments))
        except TypeError as error:
            return {**found, "refusal": str(error)}
        return found

    def call(self, arguments: bytes) -> Json:
        assert self._function is not None
        rewards = self._function(**pickle.loads(arguments))
        if inspect.isawaitable(rewards):
            rewards = self._runner.run(_awaited(rewards))
        return _reply(rewards)

    def call_each(self, arguments: bytes, concurrency: int, seconds: float) -> Json:
        """Call an async function for each sample by itself, so many at a time, each with a time limit of its own."""
        batch = pickle.loads(arguments)
        samples = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(len(batch["prompts"]))]
        return {"each": self._runner.run(self._gathered(samples, concurrency, seconds))}

    async def _gathered(self, samples: Sequence[Json], concurrency: int, seconds: float) -> list[Json]:
        gate = asyncio.Semaphore(concurrency)

        async def one(sample: Json) -> Json:
            assert self._function is not None
            async with gate:
                try:
                    async with asyncio.timeout(seconds) as limit:
                        return _reply(await self._function(**sample))
                except BaseException as error:  # the others go on, whatever becomes of this one
                    if limit.expired():
                        return {"timeout": seconds}
                    return {"error": one_line(error), "traceback": _told(error)}

        return list(await asyncio.gather(*map(one, samples)))


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _reply(rewards: Any) -> Json:
    rewards = _as_json(rewards)
    return {"rewards": rewards} if isinstance(rewards, list) else {"wrong_type": _type_name(rewards)}


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _as_json(value: Any) -> Any:
    """Numbers, None and lists of them as JSON has them; anything else becomes `{"wrong_type": its name}`."""
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors on any device
        value = value.tolist()
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # an int beyond the range of floats
            return float("inf")
    return {"wrong_type": type(value).__name__}


def _type_name(value: Any) -> str:
    return value["wrong_type"] if isinstance(value, dict) else type(value).__name__


def one_line(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero (my_rewards.py:7)`, the line being the user's, not that of a library."""
    text = _shortened(" ".join("".join(traceback.format_exception_only(error)).split()))
    frames = _calls(error)
    users = [f for f in frames if not _of_library(f.filename)] or frames
    return f"{text} ({os.path.basename(users[-1].filename)}:{users[-1].lineno})" if users else text


def _calls(error: BaseException) -> list[traceback.FrameSummary]:
    """Where it was raised, from the user's function down: without ourselves and the machinery of imports."""
    frames = traceback.extract_tb(error.__traceback__)
    own = (__file__, importlib.__file__)
    return [f for f in frames if f.filename not in own and not f.filename.startswith("<frozen")]


def _shortened(text: str) -> str:
    """A long text without its middle: an exception begins with its kind and often ends with what matters."""
    half = (EXCEPTION_CHARACTERS - len(" ... ")) // 2
    return text if len(text) <= EXCEPTION_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _of_library(filename: str) -> bool:
    return filename.startswith(STANDARD_LIBRARY) or any(f"{kind}-packages" in filename for kind in ("site", "dist"))


def _told(error: BaseException) -> str:
    """The exception in one line, then the last lines of where it was raised; what is too long loses the outer calls."""
    first = one_line(error)
    calls = "".join(traceback.format_list(_calls(error))).splitlines()
    calls = [line.rstrip() for line in calls if line.strip(" ^~")]  # markers below a line of code say nothing here
    rest = "\n".join(calls[-TRACEBACK_LINES:])
    return f"{first}\n{rest[-(TRACEBACK_CHARACTERS - len(first) - 1) :]}".rstrip()


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel signal our process group when the parent's end of this pipe closes.

    A thread that watches the pipe would not do: a catastrophic regular expression holds the interpreter
    lock, and the worker of a parent that was itself killed would burn a core for ever. SIGIO ends a process
    by default on Linux; elsewhere the worker ends when the function returns and stdin is found closed.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for the conversation; prints go to stderr, and `input()` finds nothing."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # which is line-buffered: what was printed before a kill is seen
    return requests, replies


def main() -> None:
    requests, replies = _claim_pipes()
    _die_with_parent(int(sys.argv[1]))
    process = RewardProcess()
    while header := requests.read(HEADER_BYTES):
        request = pickle.loads(requests.read(int.from_bytes(header, "big")))
        number = request.pop("number")  # the reply bears it
        replies.write(frame(json.dumps({"number": number, **process.answer(request)}).encode()))
        replies.flush()
    os._exit(0)  # threads left behind by the function must not keep the worker alive


if __name__ == "__main__":
    main()
