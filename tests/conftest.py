"""One thread, and no test that quietly proves nothing: an unexpected skip fails the run."""

import os
import signal

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is first imported, here and in subprocesses
    os.environ[name] = "1"

# A shell starts what runs in the background with SIGINT ignored, and runs respect that; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXPECTED_SKIPS: tuple[str, ...] = ()
"""Reasons for which a test may be skipped, word for word. Empty: everything runs everywhere, GPU or not."""

_unexpected: list[str] = []


def _watch(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped:
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "?")
        if reason.removeprefix("Skipped: ") not in EXPECTED_SKIPS:
            _unexpected.append(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = pytest_collectreport = _watch


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _unexpected:
        terminalreporter.section("unexpected skips fail the run", red=True)
        terminalreporter.line("allow one in EXPECTED_SKIPS of tests/conftest.py only for a reason that is stated there")
        for line in _unexpected:
            terminalreporter.line(line)
