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
TRACEBACK_LINES, TRACEBACK_CHARACTERS = 8, 4000

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
            return {"error": _one_line(error), "traceback": _last_lines()}

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
                    return {"error": _one_line(error), "traceback": _last_lines()}

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


def _one_line(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero (rewards.py, line 7)`."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())[:TRACEBACK_CHARACTERS]
    frames = traceback.extract_tb(error.__traceback__)
    own = {__file__, importlib.__file__}
    users = [f for f in frames if f.filename not in own and not f.filename.startswith("<frozen")]
    return f"{text} ({os.path.basename(users[-1].filename)}, line {users[-1].lineno})" if users else text


def _last_lines() -> str:
    return "\n".join(traceback.format_exc().strip().splitlines()[-TRACEBACK_LINES:])[-TRACEBACK_CHARACTERS:]


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
