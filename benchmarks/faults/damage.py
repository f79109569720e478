"""A damaged checkpoint is never used: every file of one truncated, emptied, bit-flipped and removed in turn.

    python benchmarks/faults/damage.py

A run of six steps is killed behind the fifth, with checkpoints of steps 2 and 4. Each damage to the newer one must
lead back to the older, with a warning, and the resumed run must end as one that was never stopped. The same damage to
both must be refused in one sentence, with every row of the log left where it is.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import REFUSED, DiesAt, ended, forked, run, same_end
from outcome import conclude

FLIPS = 3
EVERY_TWO = "checkpoint.every=2"


def damages(draws: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield "truncated", lambda path: path.write_bytes(path.read_bytes()[: draws.randrange(path.stat().st_size)])
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "removed", lambda path: path.unlink()
    for number in range(FLIPS):
        yield f"bit flipped ({number + 1})", lambda path: flip(path, draws)


def flip(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def resumed(folder: Path) -> tuple[int, str]:
    """Exit code of the resumed run, and what it said."""
    said = folder.with_name("said")
    code = ended(forked(lambda: run(folder, EVERY_TWO), said))
    return code, said.read_text()


def one_damaged(stopped: Path, whole: Path, name: str, damage: Callable[[Path], object]) -> bool:
    """The one before is used, and the damage is named."""
    folder = stopped.with_name("one")
    shutil.copytree(stopped, folder)
    damage(folder / "checkpoint-4" / name)
    code, said = resumed(folder)
    fine = code == 0 and "checkpoint-4 is skipped" in said and same_end(folder, whole)
    shutil.rmtree(folder)
    return fine


def both_damaged(stopped: Path, name: str, damage: Callable[[Path], object]) -> bool:
    """One clear sentence, and nothing that was logged is lost."""
    folder = stopped.with_name("both")
    shutil.copytree(stopped, folder)
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        damage(folder / checkpoint / name)
    code, said = resumed(folder)
    sentences = [line for line in said.splitlines() if line.startswith("dvpo: ")]
    kept = (folder / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    fine = code == REFUSED and kept and len(sentences) == 1 and "holds no sound checkpoint" in sentences[0]
    shutil.rmtree(folder)
    return fine


def measure(place: Path, wanted: str = "*") -> tuple[bool, dict[str, Any]]:
    """Whether no damage to the files of these names had a consequence, and the figures."""
    stopped, whole, draws = place / "stopped", place / "whole", random.Random(0)
    run(whole, EVERY_TWO)
    ended(forked(lambda: run(stopped, EVERY_TWO, observer=DiesAt(5))))
    newest, rows = stopped / "checkpoint-4", []
    files = sorted(path.relative_to(newest).as_posix() for path in newest.rglob(wanted) if path.is_file())
    for name in files:
        for kind, damage in damages(draws):
            used, refused = one_damaged(stopped, whole, name, damage), both_damaged(stopped, name, damage)
            rows.append({"file": name, "damage": kind, "previous_used": used, "both_refused": refused})
            print(rows[-1], flush=True)
    sums = {key: sum(row[key] for row in rows) for key in ("previous_used", "both_refused")}
    passed = sums["previous_used"] == sums["both_refused"] == len(rows) > 0
    return passed, {"files": len(files), "damages": len(rows), **sums, "each": rows}


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dvpo-damage-") as folder:
        passed, figures = measure(Path(folder))
    conclude("damage", began, passed, figures)


if __name__ == "__main__":
    main()
