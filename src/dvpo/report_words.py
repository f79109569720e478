"""The summary of a report in words: what was reached, what may be concluded from it, and what looks wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dvpo.judgement import judged, names_truth
from dvpo.metrics import MANY_CUT
from dvpo.plain_text import percent
from dvpo.report_data import Place, Run, Series
from dvpo.stats import paired_difference

SPLITS = (("id", "in distribution"), ("ood", "out of distribution"))
LATE = 5
"""The last fifth of a run stands for its end, where a single step would be noise."""
APART = 0.02
"""Series whose shares of untrue rewards lie further apart are told one by one; less may be the draw of the noise."""
LOST = 0.03
"""An end this far below the highest evaluation is worth a warning."""


@dataclass(frozen=True)
class Sentence:
    """One statement; `kind` says how to read it: `result`, `verdict` or `warning`."""

    kind: str
    text: str


def overall(places: Sequence[Place], baseline: str) -> list[Sentence]:
    """The comparison over all places of a study, where the baseline is: a seed's score is its mean over them."""
    names = dict.fromkeys(series.name for place in places for series in place.series)
    texts = [_compared(places, name, baseline) for name in names if name != baseline]
    return [Sentence("verdict", text) for text in texts if text]


def sentences(place: Place, baseline: str) -> list[Sentence]:
    """All that a report says about a place."""
    said = overall([place], baseline)
    said += [Sentence("result", text) for series in place.series if (text := _reached(series))]
    said += [Sentence("result", text) for text in [_noise(place)] if text]
    for series in place.series:
        said += [Sentence("result", text) for text in [_critic(series)] if text]
        said += [Sentence("warning", text) for text in _warnings(series)]
    return said


def ends(run: Run, split: str) -> tuple[float, float] | None:
    """True accuracy at the first and at the last evaluation; None where there are not two."""
    curve = run.curve(f"eval/{split}/accuracy")
    return (curve[0][1], curve[-1][1]) if len(curve) > 1 else None


def knows_truth(runs: Sequence[Run]) -> bool:
    """Whether evaluations were judged by the truth; where a run knows none, they were by its reward."""
    return all(names_truth(run.settings) and (not run.steps or bool(run.curve("reward/true"))) for run in runs)


def _reached(series: Series) -> str:
    parts: list[str] = []
    said = ""
    for split, name in SPLITS:
        pairs = [pair for run in series.runs if (pair := ends(run, split))]
        if pairs:
            before, after = fmean(first for first, _ in pairs), fmean(last for _, last in pairs)
            verb = "rose" if after - before > 0.005 else "fell" if before - after > 0.005 else "stayed"
            again, said = verb == said, verb
            moved = f"from {percent(before)} to {percent(after)}"
            if percent(before) == percent(after):
                moved = f"at {percent(after)}"
            parts.append(f"{'' if again else f'{verb} '}{moved} {name}")
    if not parts:
        return ""
    seeds = f" (mean of {len(series.runs)} seeds)" if len(series.runs) > 1 else ""
    what = judged("Accuracy", knows_truth(series.runs)).lower()
    return f"{series.name}: {what} on held-out prompts {' and '.join(parts)}{seeds}."


def _compared(places: Sequence[Place], name: str, reference: str) -> str:
    parts = []
    pairs = 0
    for split, where in SPLITS:
        mine, theirs = (_scores(places, who, split) for who in (name, reference))
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds:
            continue
        pairs = len(seeds)
        found = paired_difference([100 * mine[seed] for seed in seeds], [100 * theirs[seed] for seed in seeds])
        side = "above" if found.mean >= 0 else "below"
        part = f"{abs(found.mean):.1f} points {side} it {where}"
        if pairs > 1:
            part += f" (95% interval {found.low:+.1f} to {found.high:+.1f}, p = {found.p:.3f})"
        parts.append(part)
    if not parts:
        return ""
    text = f"{name} against {reference}: it ends {' and '.join(parts)}."
    if pairs == 1:
        return f"{text} One seed each is no evidence: differences of this size are within seed noise."
    return f"{text} Paired by {pairs} seeds; no correction for several comparisons."


def _scores(places: Sequence[Place], name: str, split: str) -> dict[int, float]:
    """Seed -> mean over the places of the accuracy at the end, for seeds that were run in all of them."""
    tables = [
        {run.seed: pair[1] for series in place.series if series.name == name for run in series.runs
         if (pair := ends(run, split))}
        for place in places
    ]  # fmt: skip
    return {seed: fmean(table[seed] for table in tables) for seed in set.intersection(*map(set, tables))}


def _noise(place: Place) -> str:
    wrong = {
        series.name: 1 - fmean(shares)
        for series in place.series
        if (shares := [value for run in series.runs for _, value in run.curve("reward/accuracy")])
    }
    if not wrong:
        return ""
    if max(wrong.values()) - min(wrong.values()) > APART:
        each = "; ".join(f"{percent(share)} in {name}" for name, share in wrong.items())
        return f"Observed rewards that were not the true ones: {each}."
    share = fmean(wrong.values())
    if share < 1e-3:
        missing = any(value > 0 for run in place.runs for _, value in run.curve("reward/missing"))
        return f"The observed rewards were the true ones{' where there was one' if missing else ''}."
    return f"{percent(share)} of the observed rewards were not the true ones."


def _critic(series: Series) -> str:
    correlation = _late(series, "critic/true_correlation")
    explained = _late(series, "critic/explained_variance")
    if correlation is None or explained is None:
        return ""
    opinion = (
        "it knows little of the truth" if correlation < 0.3
        else "it knows part of the truth" if correlation < 0.7
        else "it knows the truth well"
    )  # fmt: skip
    return (
        f"{series.name}: towards the end the critic's V correlates with the true outcome by {correlation:.2f} and "
        f"explains {percent(max(explained, 0.0))} of the observed return's variance: {opinion}."
    )


def _warnings(series: Series) -> list[str]:
    found = []
    for run in series.runs:
        curve = run.curve("eval/id/accuracy")
        if len(curve) > 1 and (lost := max(value for _, value in curve) - curve[-1][1]) > LOST:
            found.append(f"{run.label}: it ends {100 * lost:.0f} points below its highest accuracy in distribution.")
        for split, where in SPLITS:
            if (unknown := run.curve(f"eval/{split}/unknown")) and unknown[-1][1]:
                found.append(
                    f"{run.label}: {unknown[-1][1]:.0f} held-out answers {where} had no reward at the end and count in "
                    "no accuracy; if it is the wrong ones, the accuracy flatters."
                )
        if (cut := _late_of(run, "rollout/truncated")) is not None and cut > MANY_CUT:
            found.append(f"{run.label}: {percent(cut)} of the last responses were cut by the length limit.")
        if (mismatch := _late_of(run, "actor/sampler_mismatch")) is not None and mismatch > 0.01:
            found.append(
                f"{run.label}: sampler and trainer differ by {mismatch:.2g} in log-prob; it should be rounding."
            )
        if (missing := _late_of(run, "reward/missing")) is not None and missing == 1:
            found.append(f"{run.label}: at its end no response had a reward, so that nothing was learned from them.")
        if run.reward_faults:
            found.append(f"{run.label}: {len(run.reward_faults)} faults were survived; they are listed below.")
        found += [
            f"{run.label}: the alarm {name} {_rang(run, name)}first at step {row.get('step')}: {row.get('message')}."
            for name, row in run.alarms.items()
        ]
    return found


def _rang(run: Run, name: str) -> str:
    """In how many steps; nothing where only an evaluation rang it, or the steps are not there."""
    steps = run.curve(f"alarm/{name}")
    rang = sum(value > 0 for _, value in steps)
    return f"rang in {rang} of {len(steps)} steps, " if rang else "rang "


def _late(series: Series, key: str) -> float | None:
    values = [value for run in series.runs if (value := _late_of(run, key)) is not None]
    return fmean(values) if values else None


def _late_of(run: Run, key: str) -> float | None:
    """Mean over the last part of the run."""
    curve: Sequence[tuple[float, float]] = run.curve(key)
    return fmean(value for _, value in curve[-max(len(curve) // LATE, 1) :]) if curve else None
