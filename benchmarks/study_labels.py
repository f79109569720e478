"""The pseudo-labels of the noise study: what 8 answers of each starting model agree on, for every training prompt.

    python benchmarks/study_labels.py      # some 5 minutes on a quiet core; writes labels/untrained.jsonl

One file for both tasks that can be voted on, since ids are never shared; `dvpo label` makes the same answers. Draws are
keyed by seed, prompt and sample, so that another machine of the same type writes the same file.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from dvpo.label import Labeller, print_summary
from dvpo.loading import load_config

SAMPLES, PART = 8, 32
TASKS = ({"name": "math"}, {"name": "science", "ood": "untrained"})
FILE = Path(__file__).parent / "labels" / "untrained.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="the JSONL file")
    parser.add_argument("--prompts", type=int, help="only so many of the first prompts of each task (default: all)")
    options = parser.parse_args()
    lines = []
    for task in TASKS:
        labeller = Labeller(load_config({"task": task}), SAMPLES)
        count = min(options.prompts or len(labeller.examples), len(labeller.examples))
        starts = range(0, count, PART)
        labels = [label for start in starts for label in labeller.label(start, min(start + PART, count))]
        print_summary(labels, Console())
        lines += [json.dumps({"id": label.id, "answer": label.answer}) for label in labels]
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
