"""A signal stops at once, or as soon as nothing is half done; a second one in any case."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from dvpo import interrupt
from dvpo.interrupt import RESUMABLE, SIGNALS, Interrupted, check, deferred, handled


def signal_self(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def end_of_a_child(action: Callable[[], object]) -> int:
    """Exit code of a forked process; negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            with handled():
                action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_raises_wherever_the_process_is_and_no_exception_handler_takes_it(number: int, code: int):
    with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught, handled():
        signal_self(number)
    assert not isinstance(caught.value, Exception)
    assert caught.value.exit_code == code
    caught.value.resumable = True
    assert caught.value.exit_code == RESUMABLE == os.EX_TEMPFAIL


def test_what_must_not_be_left_half_done_is_finished_first():
    done = []
    with handled():
        with deferred():
            with deferred():
                signal_self()
            done.append("inner")
        done.append("outer")
        with pytest.raises(Interrupted):
            check()
    assert done == ["inner", "outer"]


def test_a_signal_that_was_swallowed_on_its_way_is_raised_by_the_next_check():
    with handled():
        check()
        try:
            signal_self()
        except BaseException:  # as around a destructor, where Python itself drops what is raised
            swallowed = True
        assert swallowed
        for _ in range(2):
            with pytest.raises(Interrupted):
                check()
    check()  # what concerned that block does not concern what follows


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_also_amid_what_is_deferred(number: signal.Signals):
    def stubborn() -> None:
        with deferred():
            signal_self(signal.SIGTERM if number == signal.SIGINT else signal.SIGINT)
            signal_self(number)

    assert end_of_a_child(stubborn) == -number


def test_a_launcher_that_signals_twice_makes_one_request_and_a_user_who_does_makes_two(monkeypatch):
    def twice() -> None:
        with deferred():
            signal_self()
            signal_self()

    assert end_of_a_child(twice) == 0
    monkeypatch.setattr(interrupt, "ONE_REQUEST_SECONDS", 0.0)
    assert end_of_a_child(twice) == -signal.SIGTERM


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored_and_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled():
            signal_self(signal.SIGINT)
            check()
            assert signal.getsignal(signal.SIGTERM) != before[0]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[1])
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_importing_installs_no_handler():
    code = (
        "import signal; before = [signal.getsignal(n) for n in (2, 15)]; import dvpo.interrupt, dvpo.cli; "
        "assert before == [signal.getsignal(n) for n in (2, 15)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thread_besides_the_main_one_may_run_a_command():
    ran = []

    def command() -> None:
        with handled():
            ran.append(True)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert ran
