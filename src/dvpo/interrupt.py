"""SIGTERM and SIGINT: a run stops at once where nothing is half done, and else as soon as nothing is.

The command line installs the handlers (`handled`); importing this file does not. The first signal raises `Interrupted`
wherever the main thread is, also in the middle of a sampled token or a hanging reward call, except inside `deferred()`,
which wraps the moments in which a state is changed. What was deferred, or swallowed on its way by somebody's
`except:`, is raised by the next `check()`. A second signal ends the process as if nobody handled it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
RESUMABLE = 75
"""Exit code of a run that was interrupted and can be resumed: EX_TEMPFAIL of sysexits.h, *try again later*."""
ONE_REQUEST_SECONDS = 0.5
"""The same signal again within this time is one request: `timeout`, say, signals its child and then the whole group."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. No `Exception`: nobody takes it for a fault of theirs."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.resumable = False
        """Whether the same command can go on with what was done."""

    @property
    def exit_code(self) -> int:
        """`RESUMABLE`, or what a shell reports for a process that the signal ended: 143, 130."""
        return RESUMABLE if self.resumable else 128 + self.number


class _Request:
    """The request to stop, and whether it has to wait: one for the process, as are its signals."""

    number: int | None = None
    arrived = 0.0
    deferrals = 0

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number, self.arrived = number, time.monotonic()
            if not self.deferrals:
                raise Interrupted(number)
        elif number != self.number or time.monotonic() - self.arrived > ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_request = _Request()


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals in this block; a signal that the process was started to ignore (`nohup`) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it would be interrupted
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _request.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request.number = None


@contextmanager
def deferred() -> Iterator[None]:
    """In this block a signal is noted, and nothing is raised: it ends in a state that can be kept."""
    _request.deferrals += 1
    try:
        yield
    finally:
        _request.deferrals -= 1


def check(agree: Callable[[int], int] | None = None) -> None:
    """Raise `Interrupted` if a signal has arrived.

    Args:
        agree: the largest number of several processes: they stop together, or one would wait for another for ever.
    """
    number = _request.number or 0
    if agree is not None:
        number = agree(number)
    if number:
        raise Interrupted(number)
