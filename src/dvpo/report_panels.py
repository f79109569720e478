"""The panels of a report: which figures are drawn, how several seeds become one line, what faults there were."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

from dvpo.charts import Chart, Line, Point
from dvpo.judgement import judged
from dvpo.plain_text import clipped, visible
from dvpo.report_data import Place, Run, Series
from dvpo.report_words import knows_truth
from dvpo.stats import student_quantile

SMOOTHED_OVER = 25
"""A step's figures jump; lines are running means over this part of the run."""


@dataclass(frozen=True)
class Figure:
    """One chart: a key of metrics.jsonl (docs/metrics.md), or two with the second dashed."""

    title: str
    key: str
    note: str
    dashed: str = ""
    names: tuple[str, str] = ("", "")
    """What the two are called."""
    percent: bool = False
    whole: bool = True
    floor: float = -math.inf
    """Values below are drawn here: one wild step must not flatten the rest."""


LEARNING = (
    Figure("True accuracy, in distribution", "eval/id/accuracy", "held-out prompts, greedy answers", percent=True),
    Figure("True accuracy, out of distribution", "eval/ood/accuracy", "the same on other prompts", percent=True),
    Figure("Reward", "reward/true", "true (solid) and observed (dashed) return of the sampled responses",
           "reward/observed", ("true", "observed")),
    Figure("Reward accuracy", "reward/accuracy", "share of responses whose observed return is the true one",
           percent=True),
    Figure("Pairwise reward accuracy", "reward/pairwise_accuracy",
           "share of pairs with the same prompt that the observed reward orders rightly; .5 is chance", percent=True),
    Figure("Missing rewards", "reward/missing", "share of responses without an observed reward", percent=True),
)  # fmt: skip

CRITIC = (
    Figure("Explained variance", "critic/explained_variance",
           "of the return by V; 1 is all of it, 0 none, values below -1 are drawn at -1", floor=-1.0),
    Figure("Correlation with the truth", "critic/true_correlation", "of V with the true return, over tokens"),
    Figure("Calibration error", "critic/calibration_error", "mean gap of V and return, over ten bins of V"),
    Figure("Value error", "critic/value_error", "root of the mean of (V - return)^2"),
    Figure("Value and return", "critic/value_mean", "mean V (solid) and mean return (dashed)",
           "critic/return_mean", ("V", "return")),
    Figure("Width of the value law", "critic/spread", "90% level less 10% level of the ensemble, mean over tokens"),
    Figure("Crossing quantiles", "critic/crossing_share", "share of neighbouring quantiles in the wrong order",
           percent=True),
    Figure("Disagreement of heads", "critic/head_disagreement", "deviation of the heads' means"),
    Figure("Gradient norm", "critic/grad_norm", "before clipping"),
)  # fmt: skip

TERMS = ("qr", "risk", "cvar", "gain", "shift", "shape", "curvature", "consistency", "conservative")

POLICY = (
    Figure("Entropy", "actor/entropy", "of the next-token distribution, in nats"),
    Figure("KL of a step", "actor/kl", "from the sampling policy to that before each update, k3 estimate"),
    Figure("KL from the start", "actor/kl_reference", "from the starting policy, k3 estimate"),
    Figure("Clipped tokens", "actor/clip_share", "share of tokens whose gradient the clip holds back", percent=True),
    Figure("Gradient norm", "actor/grad_norm", "before clipping"),
    Figure("Advantages", "actor/advantage_std", "their deviation before whitening"),
    Figure("Response length", "rollout/length", "tokens of the policy a response"),
    Figure("Truncated responses", "rollout/truncated", "share cut by the length limit", percent=True),
    Figure("Mismatch of sampler and trainer", "actor/sampler_mismatch", "of log-probs; should be rounding"),
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """A titled group of charts of one place."""

    title: str
    charts: Sequence[Chart]
    zero: Sequence[str] = ()
    """Titles of figures that were 0 all along, which needs no picture."""


def learning_panel(place: Place) -> Panel:
    extra = [
        Figure(f"{name.upper()}, {split}", f"eval/{split}/{name}", "the environment's own figure, held-out prompts")
        for split in ("id", "ood")
        for name in _own_figures(place)
    ]
    figures = [*LEARNING, *extra]
    if not knows_truth(place.runs):
        figures = [replace(f, title=f.title.replace("True accuracy", judged("Accuracy", False))) for f in figures]
    return panel(place, figures)


def critic_panel(place: Place) -> Panel:
    terms = [
        Figure("Critic loss", "critic/loss", "the terms, each with its weight"),
        *(Figure(f"Loss term: {name}", f"critic/{name}", "before its weight") for name in TERMS),
    ]
    figures = panel(place, [*CRITIC, *terms])
    tails = Chart(
        "Tails of the value law", _tails(place), "upper tail's mean less V (solid), V less the lower tail's (dashed), "
        "over the kept tokens", whole=True
    )  # fmt: skip
    return figures if tails.empty else replace(figures, charts=[*figures.charts, tails])


def panel(place: Place, figures: Sequence[Figure]) -> Panel:
    charts = [chart for figure in figures if not (chart := _chart(place, figure)).empty]
    zero = [chart.title for chart in charts if all(y == 0 for line in chart.lines for _, y in line.points)]
    return Panel(place.title, [chart for chart in charts if chart.title not in zero], zero)


def _own_figures(place: Place) -> list[str]:
    """Names of what an environment measures by itself: evaluations give it an interval, and it is no accuracy."""
    keys = {key for run in place.runs for row in run.evaluations for key in row}
    names = {key.removesuffix("_low").split("/")[-1] for key in keys if key.endswith("_low")}
    return sorted(name for name in names if name != "accuracy" and "@" not in name and "^" not in name)


def _chart(place: Place, figure: Figure) -> Chart:
    lines = []
    for series in place.series:
        for key, name, dashed in ((figure.key, figure.names[0], False), (figure.dashed, figure.names[1], True)):
            if key:
                label = f"{series.name} {name}".strip()
                lines.append(line_of(series, key, series.colour, label, dashed, figure.floor))
    return Chart(figure.title, lines, figure.note, percent=figure.percent, whole=figure.whole)


def line_of(series: Series, key: str, colour: int, name: str, dashed: bool = False, floor: float = -math.inf) -> Line:
    """The mean over a series' seeds, with Student's interval; of one seed its line, smoothed."""
    evaluated = key.startswith("eval/")
    curves = [[(x, max(y, floor)) for x, y in run.curve(key)] for run in series.runs]
    curves = [curve for curve in curves if curve]
    if len(curves) == 1:
        low, high = _over_items(series.runs, key) if evaluated else ([], [])
        points = curves[0] if evaluated else smoothed(curves[0])
        raw = [] if evaluated or len(points) < SMOOTHED_OVER else curves[0]
        return Line(name, colour, points, low, high, dashed, marks=evaluated, raw=raw)
    low, points, high = over_seeds([curve if evaluated else smoothed(curve) for curve in curves])
    return Line(name, colour, points, low, high, dashed, marks=evaluated)


def over_seeds(curves: Sequence[Sequence[Point]]) -> tuple[list[Point], list[Point], list[Point]]:
    """Mean and 95% Student interval over the steps that all curves have: lower edge, mean, upper edge."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    low, middle, high = [], [], []
    for x in shared:
        values = [table[x] for table in tables]
        mean = fmean(values)
        half = student_quantile(len(values) - 1, 0.95) * stdev(values) / math.sqrt(len(values))
        low.append((x, mean - half))
        middle.append((x, mean))
        high.append((x, mean + half))
    return low, middle, high


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Centred running mean over about one `SMOOTHED_OVER`-th of the points; fewer points stay as they are."""
    if len(points) < SMOOTHED_OVER:
        return list(points)
    reach, sums = max(len(points) // SMOOTHED_OVER // 2, 1), [0.0, *accumulate(y for _, y in points)]
    spans = [(max(0, i - reach), min(i + reach + 1, len(points))) for i in range(len(points))]
    return [(x, (sums[end] - sums[first]) / (end - first)) for (x, _), (first, end) in zip(points, spans, strict=True)]


def _over_items(runs: Sequence[Run], key: str) -> tuple[list[Point], list[Point]]:
    """The interval over held-out items that an evaluation comes with."""
    (run,) = [run for run in runs if run.curve(key)]
    known = {x for x, _ in run.curve(key)}  # an evaluation none of whose items had a reward has edges and no accuracy
    low, high = ([(x, y) for x, y in run.curve(f"{key}{end}") if x in known] for end in ("_low", "_high"))
    return low, high


def _tails(place: Place) -> list[Line]:
    lines = []
    for series in place.series:
        for name, one, other, dashed in (("upper", "upper", "value", False), ("lower", "value", "lower", True)):
            at: dict[float, list[float]] = {}
            for row in (row for run in series.runs for row in run.tokens if row.get("upper")):
                gaps = [a - b for a, b in zip(row[one], row[other], strict=True) if a is not None]
                at.setdefault(float(row["step"]), []).extend(gaps)
            points = [(step, fmean(gaps)) for step, gaps in sorted(at.items()) if gaps]
            lines.append(Line(f"{series.name} {name}", series.colour, points, dashed=dashed, marks=True))
    return lines


# Faults

LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class FaultLine:
    """What went wrong in one run."""

    run: str
    rewards: int
    """Reward calls that failed in steps."""
    evaluated: int
    """In evaluations."""
    missing: float
    """Share of responses without an observed reward."""
    skipped: int
    """Steps with an optimiser step that was left out because its gradient was not finite."""
    resumes: int
    kinds: Sequence[tuple[str, int, str]]
    """Kind, how often, the first one's message."""


def fault_lines(runs: Sequence[Run]) -> list[FaultLine]:
    return [_fault_line(run) for run in runs if run.steps]


def _fault_line(run: Run) -> FaultLine:
    def total(key: str) -> float:
        return sum(value for _, value in run.curve(key))

    counts = Counter(str(row.get("kind")) for row in run.faults)
    first: dict[str, Any] = {}
    for row in run.faults:
        first.setdefault(str(row.get("kind")), row.get("message"))
    skipped = sum(
        any(row.get(f"{name}/skipped_updates") for name in ("actor", "critic", "replay")) for row in run.steps
    )
    kinds = [(kind, count, clipped(visible(str(first[kind])), LONGEST_MESSAGE)) for kind, count in counts.most_common()]
    missing = total("reward/missing") / max(len(run.curve("reward/missing")), 1)
    resumes = len(run.manifest.get("resumes", []))
    evaluated = sum("split" in row for row in run.reward_faults)
    return FaultLine(run.label, round(total("reward/faults")), evaluated, missing, skipped, resumes, kinds)
