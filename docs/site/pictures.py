"""The pictures of the method, drawn from the functions that the method is made of: `make pictures`."""

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from dvpo.core.quantiles import quantile_levels
from dvpo.core.risk import cvar, rank_advantage, trimmed_mean, upper_mean

IMAGES = Path(__file__).parents[1] / "images"
BLUE, ORANGE, RED, GREY = "#3b82c4", "#d9822b", "#c8443c", "#888888"  # on white and on black


def law() -> None:
    """A value law of 32 quantiles with its mean and its tails, as quantile function and as atoms."""
    levels = quantile_levels(32)
    theta = 0.02 + 0.88 * torch.sigmoid((levels - 0.36) * 11) + 0.1 * levels  # mostly right, at times wrong
    low, high, mean = (float(x) for x in (cvar(theta, 4 / 32), upper_mean(theta, 4 / 32), theta.mean()))
    _, (left, bars) = pyplot.subplots(1, 2, figsize=(8, 3), width_ratios=(2, 1), sharey=True)
    for axis in (left, bars):
        tidy(axis)
    left.step(levels, theta, where="mid", color=GREY, linewidth=1)
    parts = {RED: slice(0, 4), GREY: slice(4, 28), BLUE: slice(28, 32)}
    for colour, atoms in parts.items():
        left.plot(levels[atoms], theta[atoms], "o", color=colour, markersize=4)
    heights = [theta[atoms].tolist() for atoms in parts.values()]
    bars.hist(heights, bins=20, range=(0, 1), orientation="horizontal", color=list(parts), stacked=True)
    left.hlines(low, 0, 4 / 32, color=RED)
    left.hlines(high, 28 / 32, 1, color=BLUE)
    left.axhline(mean, color=ORANGE, linewidth=1)
    left.text(0.01, mean + 0.02, f"V = {mean:.2f}, the mean", color=ORANGE)
    left.text(0.01, low + 0.14, f"lower tail {low:.2f}", color=RED)
    left.text(0.99, high - 0.13, f"upper tail {high:.2f}", color=BLUE, ha="right")
    left.set(xlabel="level tau", ylabel="return", xlim=(0, 1), ylim=(0, 1.05), title="quantile function")
    bars.set(xlabel="atoms of mass 1/32", title="the same law")
    save("law")


def trimming() -> None:
    """What is left of a Bernoulli law when its lowest mass q and its highest mass p are dropped."""
    v, q, p, atoms = 0.6, 0.3, 0.1, 1000
    _, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), width_ratios=(3, 2))
    for axis in (left, right):
        tidy(axis)
    observed = v * (1 - q) + (1 - v) * p
    left.plot([0, 1 - observed, 1 - observed, 1], [0, 0, 1, 1], color=GREY)
    left.axvspan(0, q, color=RED, alpha=0.25, linewidth=0)
    left.axvspan(1 - p, 1, color=BLUE, alpha=0.25, linewidth=0)
    left.text(q / 2, 0.5, f"dropped:\nq = {q}", ha="center", color=RED)
    left.text(1 - p / 2, 0.5, f"p = {p}", ha="center", va="center", rotation=90, color=BLUE)
    left.hlines(trimmed_mean(bernoulli(observed, atoms), q, p), q, 1 - p, color=ORANGE)
    left.text(q + 0.01, v + 0.03, f"rest: {v}", color=ORANGE)
    left.axhline(observed, color=GREY, linestyle=":", linewidth=1)
    left.text(q + 0.01, observed - 0.09, f"all: {observed:.2f}", color=GREY)
    left.set(xlabel="level", ylabel="observed reward", xlim=(0, 1), title="mean, right in 60% of all cases")
    truths = torch.linspace(0, 1, 41)
    seen = truths * (1 - q) + (1 - truths) * p
    trimmed = [float(trimmed_mean(bernoulli(float(s), atoms), q, p)) for s in seen]
    right.plot(truths, seen, color=GREY, label="mean")
    right.plot(truths, trimmed, color=ORANGE, label="trimmed")
    right.set(xlabel="true probability v", ylabel="value", title="for every v")
    right.legend(frameon=False, labelcolor=GREY)
    save("trimming")


def bernoulli(success: float, atoms: int) -> torch.Tensor:
    return (torch.arange(atoms) >= round(atoms * (1 - success))).float()


def rank() -> None:
    """Advantages of a return under a law with mean 1/2: the mean's, a clipped delta's, the rank's."""
    atoms = torch.distributions.Normal(0.5, 0.4).icdf(quantile_levels(200))
    _, axis = pyplot.subplots(figsize=(8, 3))
    tidy(axis)
    returns = torch.linspace(-2, 6, 801)
    mean = returns - atoms.mean()
    axis.plot(returns, mean, color=GREY, label="mean: G - V")
    axis.plot(returns, mean.clamp(-1, 1), color=GREY, linestyle=":", label="delta clipped at 1")
    for width, colour in ((0.0, ORANGE), (1.0, BLUE)):
        ranks = rank_advantage(returns.unsqueeze(-1), atoms.expand(len(returns), -1), width)
        axis.plot(returns, ranks, color=colour, label=f"rank, width {width:g}")
    axis.axvspan(0, 1, color=GREY, alpha=0.15, linewidth=0)
    axis.text(0.5, 3.1, "rewards\nas usual", ha="center", color=GREY)
    axis.annotate("an outlier moves the mean as far as it likes", (4.2, 3.7), (5.9, 1.7), color=GREY, ha="right")
    axis.set(xlabel="observed return G of one sample", ylabel="advantage", xlim=(-2, 6), ylim=(-2.6, 4.2))
    axis.legend(frameon=False, labelcolor=GREY, loc="lower right")
    save("rank")


def tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def save(name: str) -> None:
    pyplot.tight_layout()
    pyplot.savefig(IMAGES / f"{name}.svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close()


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "dvpo", "font.size": 10}
    for what in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[what] = GREY
    for draw in (law, trimming, rank):
        draw()


if __name__ == "__main__":
    main()
