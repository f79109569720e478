"""The guard of the test suite itself: a skip that nobody expects fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def run(folder: Path, test: str, conftest: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_it.py").write_text(f"import pytest\n\n{test}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # starts twice as fast
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "test",
    [
        "def test(): pytest.skip('no GPU')",
        "@pytest.mark.skip(reason='no GPU')\ndef test(): pass",
        "@pytest.mark.xfail(reason='no GPU')\ndef test(): assert False",
        "pytest.skip('no GPU', allow_module_level=True)",
        "pytest.importorskip('no_such_package', reason='no GPU')",
    ],
    ids=["in the test", "marked", "expected failure", "whole file", "missing package"],
)
def test_an_unexpected_skip_fails_the_run_and_is_named(tmp_path: Path, test: str) -> None:
    result = run(tmp_path, test, CONFTEST.read_text())
    assert result.returncode == 1
    assert "unexpected skips fail the run" in result.stdout
    assert "test_it.py" in result.stdout
    assert "no GPU" in result.stdout


def test_a_skip_whose_reason_is_on_the_list_and_a_run_without_skips_pass(tmp_path: Path) -> None:
    allowed = CONFTEST.read_text().replace("EXPECTED_SKIPS: tuple[str, ...] = ()", "EXPECTED_SKIPS = ('no GPU',)")
    both = "def test_skipped(): pytest.skip('no GPU')\ndef test_good(): pass"
    assert run(tmp_path, both, allowed).returncode == 0
    assert run(tmp_path, "def test_good(): pass", CONFTEST.read_text()).returncode == 0
