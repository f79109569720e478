"""How much of the truth reaches an advantage at lambda 1: what a noisy rollout is worth of a clean one.

    python benchmarks/reward_information.py      # a minute on one core

Answers to 4,000 prompts, eight each, right with the prompt's own chance s of .1, .3, .5, .7, .9, and dialogues, four to
a goal, whose rewards are graded; their rewards under
the noises of docs/protocol.md; the advantages that rows of `algorithms.py` make of them. No model: a step's useful part
is the covariance of advantage A and truth y at a given prompt, its noise A's variance, so that

    worth = E[A (y - s)]^2 / (Var[A] E[(y - s)^2])        s = E[y] of the prompt

is the number of clean rollouts with the exact baseline s that one rollout is worth: 1 for A = y - s. Of all functions
of a prompt's rewards E[y - s | rewards] has the highest worth (it is a projection): nothing made of rewards alone can
pass it, be it told the noise exactly. An exact critic knows each prompt's chance, offset and scale besides. What can
pass both is a critic that reads the answer, at lambda below 1. Errors that stay (labels) are no noise and are left out.
Writes results/reward_information.json.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dvpo import provenance
from dvpo.core.quantiles import quantile_levels
from dvpo.core.returns import GROUP_STD_EPS, group_location_scale, group_rank
from dvpo.core.risk import rank_advantage
from dvpo.noise import make_noise
from dvpo.settings import NoiseConfig

CHANCES = (0.1, 0.3, 0.5, 0.7, 0.9)
GRADES = {1 / 3: 0.31, 1 / 2: 0.245, 2 / 3: 0.21, 5 / 6: 0.047, 1.0: 0.188}
"""Share of each true reward among 1,024 dialogues of the starting model at dial 0 (the command stands in docs/log.md,
"dialogues are graded"). Half of the variance lies between goals, as of shares drawn from a Dirichlet distribution with
a sum of 1."""
PROMPTS, SAMPLES, FEWER, SEED = 4000, 8, 4, 11
ATOMS, SCALE = 32, 0.85
CEILING = "the best of all"
RESULT = Path(__file__).parent / "results" / "reward_information.json"

NOISES: dict[str, dict[str, Any]] = {
    "clean": {"kind": "none"},
    "flip": {"kind": "flip", "rate": 0.4},
    "student": {"kind": "student_t", "df": 2, "scale": SCALE},
}
NOISES["heavy"] = NOISES["student"] | {"then": [{"kind": "affine", "offset_sd": 1.0, "scale_sd": 0.5}]}


class Case(NamedTuple):
    """Rewards [P, S] under a noise, and what they hide of each prompt."""

    noise: str
    truth: Tensor
    seen: Tensor
    chances: Tensor
    """E[y], [P]."""
    offsets: Tensor
    scales: Tensor

    @property
    def expected(self) -> Tensor:
        """E[r] of each prompt, [P, 1]: what an exact critic says."""
        shares = 0.4 + 0.2 * self.chances if self.noise == "flip" else self.chances
        return (self.offsets + self.scales * shares)[:, None]


Advantage = Callable[[Case], Tensor]


def case(truth: Tensor, chances: Tensor, noise: str) -> Case:
    scatterless = NOISES[noise] | {"scale": 1e-12} if noise == "heavy" else {"kind": "none"}
    zero, one = (observed(torch.full((len(truth), 1), value), scatterless)[:, 0] for value in (0.0, 1.0))
    return Case(noise, truth, observed(truth, NOISES[noise]), chances, zero, one - zero)


def observed(truth: Tensor, noise: dict) -> Tensor:
    """The rewards [P, S] that are seen of the true ones."""
    prompts, samples = truth.shape
    ids = [str(prompt) for prompt in range(prompts) for _ in range(samples)]
    places = list(range(samples)) * prompts
    seen = make_noise(NoiseConfig(**noise), SEED)(
        truth.flatten().tolist(), ids, [0] * len(ids), places, [()] * len(ids)
    )
    return torch.tensor(seen, dtype=torch.float64).view(prompts, samples)


def law(values: Tensor) -> Tensor:
    """The quantiles [ATOMS] of all values: what a critic says that cannot tell two prompts apart."""
    return torch.tensor(np.quantile(values.numpy(), quantile_levels(ATOMS, dtype=torch.float64).numpy()))


def by_group(seen: Tensor, robust: bool) -> Tensor:
    flat, groups = seen.flatten(), torch.arange(len(seen)).repeat_interleave(seen.shape[1])
    location, scale = group_location_scale(flat, groups, torch.ones_like(flat, dtype=torch.bool), robust)
    return ((flat - location) / (scale + GROUP_STD_EPS)).view_as(seen)


def ranked_by_group(seen: Tensor) -> Tensor:
    def of(chunk: Tensor) -> Tensor:
        groups = torch.arange(len(chunk)).repeat_interleave(chunk.shape[1])
        return group_rank(chunk.flatten(), groups, torch.ones(chunk.numel(), dtype=torch.bool)).view_as(chunk)

    return torch.cat([of(chunk) for chunk in seen.split(250)])


def ranked_in_law(seen: Tensor, floor: float = 0.0) -> Tensor:
    """The rank at lambda 1: the target is the reward, a point."""
    atoms = law(seen).expand(seen.numel(), ATOMS)
    return rank_advantage(seen.reshape(-1, 1), atoms, floor=floor).view_as(seen)


def ranked_in_own_law(case: Case) -> Tensor:
    """The rank in each prompt's own law, P(r' < r) + P(r' = r)/2 - 1/2: what an exact distributional critic gives."""
    if case.noise in ("clean", "flip"):
        return (case.seen - case.expected) / 2
    standard = (case.seen - case.offsets[:, None]) / case.scales[:, None]
    below = [0.5 + t / (2 * (2 + t**2).sqrt()) for t in (standard / SCALE, (standard - 1) / SCALE)]  # Student's, df 2
    return below[0] + (below[1] - below[0]) * case.chances[:, None] - 0.5


ALONE: dict[str, Advantage] = {
    "ppo": lambda case: case.seen - case.seen.mean(),
    "ppo_reward_clip, 1": lambda case: case.seen.clamp(-1, 1) - case.seen.clamp(-1, 1).mean(),
    "ppo_delta_clip, .1": lambda case: (case.seen - case.seen.median()).clamp(-0.1, 0.1),
    "ppo_delta_clip, 1": lambda case: (case.seen - case.seen.median()).clamp(-1, 1),
    "ppo_delta_clip, 10": lambda case: (case.seen - case.seen.median()).clamp(-10, 10),
    "dvpo": lambda case: ranked_in_law(case.seen),
    "dvpo, floor .3": lambda case: ranked_in_law(case.seen, 0.3),
}
"""What a critic gives that cannot tell two prompts apart: V is the mean of all rewards, the law that of all."""
EXACT: dict[str, Advantage] = {
    "ppo": lambda case: case.seen - case.expected,
    "ppo_delta_clip, 1": lambda case: (case.seen - case.expected).clamp(-1, 1),
    "dvpo": ranked_in_own_law,
}
"""What an exact critic gives: V is E[r], the law that of each prompt."""
GROUPS: dict[str, Advantage] = {
    "dr_grpo, as published": lambda case: case.seen - case.seen.mean(1, keepdim=True),
    "norm: group (grpo, dr_grpo, reinforce_pp, ppo)": lambda case: by_group(case.seen, robust=False),
    "norm: group_robust": lambda case: by_group(case.seen, robust=True),
    "ppo_delta_clip, 1, norm: group": lambda case: by_group(case.seen, robust=False).clamp(-1, 1),
    "the same, the critic half a deviation too high": lambda case: (by_group(case.seen, False) - 0.5).clamp(-1, 1),
    "ppo, norm: group, reward.floor -.5": lambda case: by_group(case.seen, robust=False).clamp(min=-0.5),
    "dvpo, norm: group": lambda case: ranked_in_law(by_group(case.seen, robust=False)),
    "dvpo, norm: group, floor .3": lambda case: ranked_in_law(by_group(case.seen, robust=False), 0.3),
    "dvpo, norm: group, floor .5": lambda case: ranked_in_law(by_group(case.seen, robust=False), 0.5),
    "grpo_rank": lambda case: ranked_by_group(case.seen),
}
"""What groups give beside a critic that cannot tell two prompts apart."""
TOLD: dict[str, Advantage] = {
    "distance from 1/2, told that only a flipped success is 0": lambda case: (case.seen - 0.5).abs()
}
"""For dialogues: no honest reward is below 1/3, and a flip turns r into 1 - r."""


# The ceiling


def best(seen: Tensor, noise: str) -> Tensor:
    """E[y - s | the rewards of a prompt], by Bayes, told the noise and the distribution of chances: [P, S]."""
    return torch.cat([_posterior(chunk, noise) for chunk in seen.split(2000)])


def _posterior(seen: Tensor, noise: str) -> Tensor:
    # States are what a prompt's rewards share: its chance, and under `heavy` its offset and scale.
    offsets, scales, prior = _affine_states() if noise == "heavy" else (torch.zeros(1), torch.ones(1), torch.ones(1))
    standard = (seen[:, :, None] - offsets) / scales
    wrong, right = (_density(standard, value, noise) / scales for value in (0.0, 1.0))
    weights, found = [], []
    for chance in CHANCES:
        mixed = chance * right + (1 - chance) * wrong
        weights.append(mixed.log().sum(1) + prior.log())
        found.append(chance * right / mixed - chance)
    weights_PK = torch.softmax(torch.cat(weights, -1), -1)
    return (weights_PK[:, None] * torch.cat(found, -1)).sum(-1)


def _density(seen: Tensor, value: float, noise: str) -> Tensor:
    """Of an observed reward at a true one; before the prompt's own offset and scale."""
    if noise in ("clean", "flip"):
        rate = NOISES[noise].get("rate", 1e-12)
        return torch.where(seen == value, 1 - rate, rate).double()
    return (1 + ((seen - value) / SCALE) ** 2 / 2) ** -1.5  # Student's, df 2


def _affine_states() -> tuple[Tensor, Tensor, Tensor]:
    """A grid of offsets and scales with their prior."""
    offset, log_scale = (torch.linspace(-3.5, 3.5, n, dtype=torch.float64) for n in (57, 25))
    weight = torch.exp(-(offset**2) / 2)[:, None] * torch.exp(-(log_scale**2) / 2)[None]
    one, other = torch.meshgrid(offset, log_scale * 0.5, indexing="ij")
    return one.flatten(), other.exp().flatten(), weight.flatten()


def worth(advantages: Tensor, truth: Tensor, chances: Tensor) -> float:
    deviation = truth - chances[:, None]
    useful = (advantages * deviation).mean()
    return float(useful**2 / (advantages.var() * (deviation**2).mean()))


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """Part -> advantage -> noise -> worth."""
    alone: Advantage = lambda case: best(case.seen.view(-1, 1), case.noise).view_as(case.seen)  # noqa: E731
    answered, talked = ([case(*drawn, noise) for noise in NOISES] for drawn in (answers(), dialogues()))
    parts = {
        "one sample": (answered, ALONE | {CEILING: alone}),
        "one sample, an exact critic": (answered, EXACT),
        "groups of eight": (answered, GROUPS | {CEILING: lambda case: best(case.seen, case.noise)}),
        "dialogues, groups of four": (talked, GROUPS | TOLD),
    }
    return {
        part: {
            name: {case.noise: worth(advantage(case), case.truth, case.chances) for case in cases}
            for name, advantage in rows.items()
        }
        for part, (cases, rows) in parts.items()
    }


def answers() -> tuple[Tensor, Tensor]:
    """Truths [P, S] of 0 or 1, and each prompt's chance [P]."""
    chances = torch.tensor(CHANCES, dtype=torch.float64).repeat(PROMPTS // len(CHANCES))
    drawn = torch.rand(PROMPTS, SAMPLES, generator=torch.Generator().manual_seed(SEED))
    return (drawn < chances[:, None]).double(), chances


def dialogues() -> tuple[Tensor, Tensor]:
    """Graded truths [P, S], and the mean [P] of each goal."""
    generator = np.random.default_rng(SEED)
    values = np.array(list(GRADES))
    shares = generator.dirichlet(list(GRADES.values()), size=PROMPTS)
    drawn = generator.random((PROMPTS, FEWER, 1)) > shares.cumsum(1)[:, None]
    return torch.tensor(values[drawn.sum(-1).clip(max=len(values) - 1)]), torch.tensor(shares @ values)


def section() -> str:
    """The tables for the results' page, from the committed file."""
    kept = json.loads(RESULT.read_text())
    source = f"[`{RESULT.name}`](../benchmarks/results/{RESULT.name}), commit {kept['commit'][:7]}"
    lines = [
        "### What a noisy rollout is worth",
        "",
        f"How many clean rollouts one noisy rollout is worth ({source}, by `python benchmarks/{Path(__file__).name}`).",
    ]
    for part, rows in kept["worth"].items():
        lines += ["", f"**{part}**", "", f"| advantage | {' | '.join(NOISES)} |", "| --- |" + " ---: |" * len(NOISES)]
        lines += [f"| {name} | {' | '.join(f'{row[n]:.3f}' for n in NOISES)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    parts = measure()
    for part, rows in parts.items():
        table = Table("advantage", *NOISES, title=f"{part}: clean rollouts that one is worth")
        for name, row in rows.items():
            table.add_row(name, *(f"{row[noise]:.3f}" for noise in NOISES))
        Console().print(table)
    source = {"commit": provenance.source().commit, "machine": provenance.machine("cpu")["cpu"]}
    rounded = {p: {a: {n: round(w, 4) for n, w in row.items()} for a, row in rows.items()} for p, rows in parts.items()}
    RESULT.write_text(json.dumps({"worth": rounded, **source}, indent=1) + "\n")


if __name__ == "__main__":
    main()
