"""What users install is the wheel: built here, installed into an empty environment elsewhere, run from there."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_finished_models_and_the_type_marker_but_no_tests(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path)) as wheel:
        names = wheel.namelist()
        weights = [wheel.getinfo(n) for n in names if n.startswith("dvpo/assets/") and n.endswith("model.safetensors")]
    assert len(weights) == 6
    assert max(info.file_size for info in weights) <= 1_000_000
    assert "dvpo/py.typed" in names
    pages = {path.name for path in (ROOT / "src" / "dvpo" / "templates").iterdir()}
    assert {f"dvpo/templates/{name}" for name in pages} <= set(names)
    assert not [n for n in names if "test" in n.split("/")[0]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_from_the_wheel_in_an_empty_environment_elsewhere(tmp_path: Path) -> None:
    wheel = build(tmp_path / "dist")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    # torch on its own first: pip then sees it installed and asks the index for no other build.
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DVPO_CACHE": str(tmp_path / "cache")}
    demo = subprocess.run(
        [python.with_name("dvpo"), "demo", "--steps", "2", "--output", "runs"],
        cwd=elsewhere,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "OOD before" in demo.stdout
    assert (elsewhere / "runs" / "report.html").exists()
    assert "site-packages" in demo.stdout  # the starting model came out of the wheel
    assert (elsewhere / "runs" / "dvpo" / "checkpoint-2" / "policy" / "model.safetensors").exists()
