"""A starting model ten times as large as the embedded one, for one cell of the noise study (docs/protocol.md).

    OMP_NUM_THREADS=1 python benchmarks/larger_model.py        # runs/larger_model

1.6 million parameters against 165 thousand; the same tokenizer, lessons and steps.
"""

import argparse
import json
from pathlib import Path

from dvpo.embedded import make_config, make_model, make_tokenizer
from dvpo.lessons import SOURCES
from dvpo.policy import Policy
from dvpo.verdicts import measure
from dvpo.warmstart import Recipe, progress_reports, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/larger_model"), help="where the model is put")
    folder = parser.parse_args().folder
    # 2.5 times as wide: the rate falls as the width rises, the first weights' deviation as its root.
    recipe, config = Recipe(learning_rate=1.2e-3), make_config(160, 5, 480)
    config.initializer_range = 0.06
    tokenizer, model = make_tokenizer(), make_model(config, seed=recipe.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    with progress_reports(recipe.steps, True) as report:
        train(model, tokenizer, recipe, report)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    metrics = measure(Policy(model, tokenizer), SOURCES[recipe.task].make_task())
    (folder / "warmstart.json").write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    print(json.dumps(metrics, indent=2, default=str))


if __name__ == "__main__":
    main()
