"""What a benchmark on one thread leaves: its rows in a JSON file, with the commit and the machine that made them."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvpo import provenance

Row = dict[str, Any]


def record(
    about: str | None,
    result: Path,
    settings: dict[str, Any],
    make: Callable[[], list[Row]],
    show: Callable[[list[Row]], None],
) -> None:
    """Make the rows, show them, and write them beneath the facts and the settings of the benchmark.

    Args:
        about: the text of `--help`.
        result: the JSON file, unless `--output` names another.
        settings: told in the file.
        make: imports torch itself, after its threads are set.
        show: prints the rows.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=result, help="the JSON file")
    output = parser.parse_args().output
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
    facts = {
        "commit": provenance.source().commit,
        "machine": provenance.machine("cpu") | {"threads": 1},
        "versions": provenance.versions(),
        **settings,
    }
    rows = make()
    show(rows)
    output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(f"written: {output}")
