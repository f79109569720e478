"""A starting model ten times as large as the embedded one, for one cell of the noise study (docs/protocol.md).

    OMP_NUM_THREADS=1 python benchmarks/larger_model.py        # runs/larger_model

1.6 million parameters against 165 thousand; the same tokenizer, lessons and steps.
"""

import argparse
from pathlib import Path

from dvpo.embedded import make_config
from dvpo.warmstart import Recipe, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/larger_model"), help="where the model is put")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of the warm start")
    options = parser.parse_args()
    # 2.5 times as wide: the rate falls as the width rises, the first weights' deviation as its root.
    config = make_config(hidden_size=160, num_hidden_layers=5, intermediate_size=480)
    config.initializer_range = 0.06
    folder = build(Recipe(learning_rate=1.2e-3, steps=options.steps), options.folder, config=config)
    print((folder / "warmstart.json").read_text())


if __name__ == "__main__":
    main()
