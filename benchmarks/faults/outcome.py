"""Where the experiments' results go; and the tests' tiny models, tasks and runs, which they use."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from dvpo import provenance  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def conclude(name: str, began: float, passed: bool, figures: dict[str, Any]) -> None:
    """Write results/faults_<name>.json, show it, and end with exit code 1 if the claim does not hold."""
    result = {
        "commit": provenance.source().commit,
        "machine": provenance.machine("cpu"),
        "versions": provenance.versions(),
        "seconds": round(time.monotonic() - began, 1),
        "passed": passed,
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1)
    (RESULTS / f"faults_{name}.json").write_text(text + "\n")
    print(text)
    sys.exit(not passed)
