"""Runs the Triton kernel in Triton's interpreter, on a CPU: prints its greatest differences to torch's float64 form.

A program of its own, since Triton reads TRITON_INTERPRET when it is first imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dvpo.core import sorted_huber, triton_huber
from dvpo.core.quantiles import quantile_levels

SIZES = [(5, 3, 20, 33), (3, 1, 1, 1), (2, 2, 64, 64), (2, 3, 50, 200), (0, 2, 4, 4)]
"""Tokens, heads, quantiles, atoms: powers of 2 and not, one of each, none."""


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens, heads, quantiles, atoms in SIZES:
        theta = torch.randn(tokens, heads, quantiles, generator=generator) + 1e4
        targets = torch.randn(tokens, atoms, generator=generator) + 1e4
        for tied in (False, True):  # with ties everywhere, on a grid of a half
            given = [(2 * x).round() / 2 if tied else x for x in (theta, targets.sort(-1).values)]
            for kappa in (0.0, 0.5 if tied else 0.3):  # .3 is none of float32's numbers, .5 makes ties
                arguments = (quantile_levels(quantiles), kappa)
                ours = triton_huber.huber_sums(*given, *arguments)
                exact = sorted_huber.huber_sums(*(x.double() for x in given), *arguments)
                gaps = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(ours, exact, strict=True)]
                rows.append({"sizes": [tokens, heads, quantiles, atoms], "kappa": kappa, "tied": tied, "gaps": gaps})
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main()
