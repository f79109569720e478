"""Every table and figure of docs/results.md and docs/results_tables.md, from the committed rows; nothing is trained.

    make results

A study that has not all of its rows yet is shown with what is there, and says so.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import noise_predictions
import reward_information
import trials
from markupsafe import Markup
from noise_figures import contrasts
from noise_parts import (
    CLEAN,
    NINE,
    RANDOM,
    REPORTING,
    ROOT,
    ROWS,
    TRIALS,
    TUNING,
    Part,
    complete,
    rows_at,
    rows_of,
    study_at,
    whole_seeds,
)

from dvpo.stats import PairedDifference, holm, paired_difference, student_quantile
from dvpo.study import Study
from dvpo.study_results import Row, row_key
from dvpo.study_table import (
    NONE,
    SPLITS,
    Report,
    Sheet,
    difference_text,
    make_report,
    overviews,
    stability,
    to_markdown,
)

DOCS = ROOT / "docs"
CRITICS = ROWS / "critic_seen.json"
IMAGES = DOCS / "images"
PAGE, TABLES = DOCS / "results.md", DOCS / "results_tables.md"
LEVEL = 0.05
FEWEST_TESTED = 6
"""Fewer pairs cannot give a p below .05, whatever happens: none is shown."""
ANSWERS, CONVERSATIONS = 1.2, 8.9
"""Seconds of an evaluation, of 2 x 256 answers and of 2 x 128 conversations (docs/protocol.md, "What it costs")."""
BEGIN, END = "<!-- results: written by make results -->", "<!-- /results -->"


# What a part shows


def head(part: Part) -> tuple[str, list[Row]]:
    """Its title and how much of it is there, and the rows."""
    study, rows = rows_of(part)
    place, source = (path.relative_to(ROOT) for path in (part.rows, part.study))
    link = f"[`{place}`](../{place})" if part.rows.exists() else f"`{place}`"
    text = (
        f"### {part.title}\n\n{len(rows)} of {len(study.cells)} rows are there ({link}, of [`{source}`](../{source}))"
    )
    if not rows:
        return f"{text}. No row is committed here yet: there is no table.\n", rows
    commits = ", ".join(sorted({str(row["commit"])[:7] for row in rows}))
    seconds = sum(row["seconds"] for row in rows)
    text += f". Made at {commits} on {', '.join(sorted({row['machine'] for row in rows}))}, one thread a run, "
    return f"{text}{seconds / 3600:.1f} hours of training steps in all.\n\n", rows


def figures(part: Part) -> dict[Path, Markup]:
    """File -> picture, of what can be drawn."""
    study, rows = whole_seeds(part)
    return {IMAGES / f"{name}.svg": drawn for name, draw in part.figures.items() if (drawn := draw(study, rows))}


def summary(part: Part) -> str:
    """Who ended above whom, all its places side by side: of the seeds that have every cell."""
    text, there = head(part)
    study, rows = whole_seeds(part)
    if not rows:
        return text + ("No seed has every cell yet.\n" if there else "")
    planned = study_at(part.study, part.only).names("seed")
    text += f"Seeds that have every cell: {len(study.names('seed'))} of {len(planned)}. {part.note}".rstrip() + "\n\n"
    for path in figures(part):
        text += f"![{part.title}]({path.relative_to(DOCS)})\n\n"
    sheets = [contrast_sheet(part, study, rows), *with_dial0(part, overviews(study, rows))]
    if part.by_task and len(study.names("seed")) > 1:
        sheets[1:1] = [*task_sheets(part, study, rows), stability_sheet(part, study, rows)]
    if part.rises:
        sheets.append(rise_sheet(study, rows))
    sheets += [] if part.only else critic_sheets(part)
    if part.pooled and len(study.names("seed")) > 1:
        text += resolution([d for _, _, d in contrasts(study, rows, part.baseline)])
    return text + to_markdown(Report(tuple(sheets), ()))


def contrast_sheet(part: Part, study: Study, rows: Sequence[Row]) -> Sheet:
    """The baseline less each other row, paired by seed: over all places with Holm's p, and without at dial 0 and for
    each noise."""
    groups = {"all places": (study, rows)} if part.pooled else {}
    groups |= {"dial 0": whole_seeds(part.dial0)} if part.dial0 else {}
    groups |= {name: (of, rows) for name, of in apart(study, "noise").items()}
    found = [{(name, split): d for name, split, d in contrasts(*of, part.baseline)} for of in groups.values()]
    tested = part.pooled and len(study.names("seed")) >= FEWEST_TESTED
    p_values = dict(zip(found[0], holm([d.p for d in found[0].values()]), strict=True)) if tested else {}
    lines = []
    for name, split in found[0]:
        shown = [difference_text(of[name, split]) if (name, split) in of else NONE for of in found]
        p = [f"{p_values[name, split]:.3f}"] if tested else []
        lines.append((name, split.upper(), *shown[:1], *p, *shown[1:]))
    first, *rest = groups
    columns = ("algorithm", "split", first, *(["p (Holm)"] * tested), *rest)
    return Sheet(f"{part.baseline} less each row, points, paired by seed", columns, tuple(lines))


def with_dial0(part: Part, sheets: Sequence[Sheet]) -> list[Sheet]:
    """Overviews with each row's mean over all places and seeds as a last column, and at dial 0 as another."""
    if part.dial0 is None:
        return list(sheets)
    means = {"all places": whole_seeds(part)[1], "dial 0": whole_seeds(part.dial0)[1]}
    kinds = (("id_true", 100, ".1f"), ("ood_true", 100, ".1f"), ("corr", 1, "+.2f"))

    def mean_of(rows: Sequence[Row], name: str, key: str, scale: int, form: str) -> str:
        known = [scale * row[key] for row in rows if row["algorithm"] == name and row[key] is not None]
        return format(fmean(known), form) if known else NONE

    return [
        replace(
            sheet,
            columns=(*sheet.columns, *means),
            lines=tuple((*line, *(mean_of(rows, line[0], *kind) for rows in means.values())) for line in sheet.lines),
        )
        for sheet, kind in zip(sheets, kinds, strict=True)
    ]


def apart(study: Study, axis: str) -> dict[str, Study]:
    """The study of each noise, or of each task, by itself; none where there is but one."""
    names = study.names(axis)
    cells = {name: tuple(cell for cell in study.cells if getattr(cell, axis) == name) for name in names}
    return {name: replace(study, cells=of) for name, of in cells.items()} if len(names) > 1 else {}


def task_sheets(part: Part, study: Study, rows: Sequence[Row]) -> list[Sheet]:
    """The same differences task by task, and how far a row's end scatters between seeds in each."""
    tasks = apart(study, "task")
    found = [contrasts(of, rows, part.baseline) for of in tasks.values()]
    less = [
        (name, split.upper(), *(difference_text(of[line][2]) for of in found))
        for line, (name, split, _) in enumerate(found[0])
    ]
    scatter = [
        (name, *(f"{scatter_of(study, rows, task, name, split):.1f}" for task in tasks for split in SPLITS))
        for name in study.names("algorithm")
    ]
    columns = [f"{task} {split.upper()}" for task in tasks for split in SPLITS]
    return [
        Sheet(f"{part.baseline} less each row, task by task", ("algorithm", "split", *tasks), tuple(less)),
        Sheet("deviation of an end between seeds, mean over the noises", ("algorithm", *columns), tuple(scatter)),
    ]


def stability_sheet(part: Part, study: Study, rows: Sequence[Row]) -> Sheet:
    """The protocol's second outcome, end less peak, over all places; the baseline less each other row is paired."""
    falls = [{**row, **{f"{split}_true": stability(row, split) for split in SPLITS}} for row in rows]
    less = {(name, split): difference_text(d) for name, split, d in contrasts(study, falls, part.baseline)}
    lines = []
    for name in study.names("algorithm"):
        means = [100 * fmean(row[f"{split}_true"] for row in falls if row["algorithm"] == name) for split in SPLITS]
        lines.append((name, *(f"{mean:+.1f}" for mean in means), *(less.get((name, split), NONE) for split in SPLITS)))
    columns = ("algorithm", "ID", "OOD", f"{part.baseline} less it, ID", "OOD")
    return Sheet("stability: end less peak, points, over all places", columns, tuple(lines))


def scatter_of(study: Study, rows: Sequence[Row], task: str, algorithm: str, split: str) -> float:
    """Points by which the end of a row deviates from seed to seed in one place: the mean over the task's noises."""
    ends = [
        [100 * row[f"{split}_true"] for row in rows if (row["task"], row["noise"], row["algorithm"]) == at]
        for at in ((task, noise, algorithm) for noise in study.names("noise"))
    ]
    return fmean(stdev(of) for of in ends)


def resolution(found: Sequence[PairedDifference]) -> str:
    """What these seeds can show: the difference that Student's test finds in four studies of five, at .05 and at the
    level that Holm asks of the first of all lines.

    (t(1 - level / 2) + t(.8)) sd / sqrt(n),  t of n - 1 degrees of freedom, sd of a seed's difference as measured
    """
    halves, pairs = [(d.high - d.low) / 2 for d in found], found[0].pairs
    at_level, at_power, at_first = (student_quantile(pairs - 1, t) for t in (0.95, 0.6, 1 - LEVEL / len(found)))
    deviations = [half * pairs**0.5 / at_level for half in halves]
    single, first = ([half * (t + at_power) / at_level for half in halves] for t in (at_level, at_first))
    return (
        f"A seed's difference over all places deviates by {min(deviations):.1f} to {max(deviations):.1f} points: "
        f"{pairs} seeds show a true difference of about {min(single):.1f} to {max(single):.1f} points in four studies "
        f"of five before correction, of {min(first):.1f} to {max(first):.1f} as the first of {len(found)} lines "
        "after it.\n\n"
    )


def critic_sheets(part: Part) -> list[Sheet]:
    """What critics with a law looked like, of the runs whose logs `critic_seen.py` has read; none for other parts."""
    found = json.loads(CRITICS.read_text()).get(part.study.stem) if CRITICS.exists() else None
    if not found:
        return []
    figures = {"true_correlation": "+.2f", "calibration_error": ".2f", "spread": ".2f", "head_disagreement": ".3f"}
    lines = [
        (
            line["algorithm"],
            *(line["task"], line["noise"], str(line["seeds"])),
            *(f"{line['first'][name]:{form}} to {line['last'][name]:{form}}" for name, form in figures.items()),
        )
        for line in found
    ]
    columns = ("algorithm", "task", "noise", "seeds", "knows", "miscalibrated", "width", "heads apart")
    return [Sheet("what the critic saw, first step to last fifth", columns, tuple(lines))]


def rise_sheet(study: Study, rows: Sequence[Row]) -> Sheet:
    """Whether a row's end stands above its start: a seed's mean over both splits and all places; and task by task."""
    tasks, lines = study.names("task"), []
    for name in study.names("algorithm"):
        d = rise(study, rows, name)
        by_task = [rise(study, [row for row in rows if row["task"] == task], name) for task in tasks]
        lines.append((name, difference_text(d), _yes(d.low > 0), *map(difference_text, by_task)))
    heads = ("algorithm", "end less start [95%]", "rises", *tasks)
    return Sheet("end less start, both splits", heads, tuple(lines))


def rise(study: Study, rows: Sequence[Row], name: str) -> PairedDifference:
    seeds = study.names("seed")
    mine = [[row for row in rows if (row["algorithm"], row["seed"]) == (name, seed)] for seed in seeds]
    ends = [fmean(map(noise_predictions.both, of_seed)) for of_seed in mine]
    starts = [fmean(50 * (row["id_before"] + row["ood_before"]) for row in of_seed) for of_seed in mine]
    return paired_difference(ends, starts)


def section(part: Part) -> str:
    """A table for each of its places, of the rows that are there; lines without a row left out."""
    text, rows = head(part)
    if not rows:
        return text
    study = study_at(part.study, part.only)
    if part is TRIALS:
        text += "ID / OOD of each task, means over the seeds; `dvpo` is the mean of the law here.\n\n"
        return text + "\n".join(trials.summary(study, rows)) + "\n"
    report = make_report(study, rows, part.baseline or study.names("algorithm")[0])
    places = len(study.places)
    pooled = report.sheets[places : places + 1] if len(complete(study, rows)) == len(rows) and part.pooled else ()
    sheets = [_with_rows(sheet) for sheet in (*report.sheets[:places], *pooled)]
    return text + to_markdown(Report(tuple(sheet for sheet in sheets if sheet.lines), ()))


def _with_rows(sheet: Sheet) -> Sheet:
    return replace(sheet, lines=tuple(line for line in sheet.lines if line[3:4] != (NONE,)))


def glance() -> str:
    """A line a part: `dvpo` less `ppo`, and less the row that ends highest, each over all places."""
    lines = []
    for part in REPORTING:
        if not part.pooled or part.baseline != NINE.baseline:
            continue
        study, rows = whole_seeds(part)
        planned = len(study_at(part.study, part.only).names("seed"))
        link = f"[{part.title}](#{anchor(part.title)})"
        if not rows:
            lines.append((link, f"0 of {planned}", *[""] * 5))
            continue
        found = {(name, split): d for name, split, d in contrasts(study, rows, part.baseline)}
        best = min((name for name, _ in found), key=lambda name: sum(found[name, split].mean for split in SPLITS))
        shown = [
            difference_text(found[name, split]) if (name, split) in found else NONE
            for name in ("ppo", best)
            for split in SPLITS
        ]
        seeds = f"{len(study.names('seed'))} of {planned}"
        lines.append((link, seeds, *shown[:2], f"`{best}`", *shown[2:]))
    return "\n".join(
        [
            f"**At a glance: `{NINE.baseline}` less another row, points, paired by seed, over all places of a part**",
            "",
            "| part | seeds | less `ppo`, ID | OOD | highest other row | less it, ID | OOD |",
            "|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "The highest row is chosen by what it reached, ID and OOD together, which flatters it. Nothing is "
            "corrected here. Parts whose noises may not be averaged are left out.\n\n",
        ]
    )


def anchor(title: str) -> str:
    """Of a heading, as a page's links name it."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


# What the protocol asks


def costs() -> str:
    """All rows of reporting and tuning seeds, and the hours that their training steps and evaluations took."""
    files = {part.rows for part in (*REPORTING, *TUNING) if part.rows.exists()}
    rows = [row for path in sorted(files) for row in rows_at(path)]
    training = sum(row["seconds"] for row in rows) / 3600
    each = [CONVERSATIONS if "dialogue" in row["task"] else ANSWERS for row in rows]
    evaluations = sum(len(row["curve"]) * seconds for row, seconds in zip(rows, each, strict=True)) / 3600
    return (
        f"**Cost.** {len(rows):,} runs, tuning included: {training:.0f} core-hours of training steps, and by the "
        f"protocol's table some {evaluations:.0f} of evaluations: {training + evaluations:.0f} together. Starting "
        "models (minutes each) are not in them.\n\n"
    )


def verdict() -> str:
    """The protocol's claims, each with what the rows say: of complete seeds, and final only with all of them."""
    study, rows = whole_seeds(NINE)
    if not rows:
        return ""
    seeds, planned = len(study.names("seed")), len(study_at(NINE.study).names("seed"))
    when = "final" if seeds == planned else f"interim: {seeds} of {planned} seeds, nothing is concluded"
    claims = [*_cell_claims(study, rows), _contrast_claim(study, rows), _clean_claim(), _random_claim()]
    fails = next((claim for claim, holds, _ in claims if holds == "no"), None)
    head = f"**The protocol's claims, nine cells ({when}).** "
    head += f"The first that fails: {fails}." if fails else "None of those that are decided fails."
    lines = [f"| {' | '.join(claim)} |" for claim in claims]
    chance = f"{_chance_of_the_count(study, rows)}\n\n" if seeds > 1 else ""
    table = "\n".join([head, "", "| claim | holds | what the rows say |", "|---|---|---|", *lines])
    return f"{table}\n\n{chance}"


def _chance_of_the_count(study: Study, rows: Sequence[Row]) -> str:
    """How often the first two claims would hold of a row that is ahead, by the deviations that were measured."""
    spread = [fmean(scatter**2 for scatter in _differences_in_cells(study, rows, split)) ** 0.5 for split in SPLITS]
    by_points = [f"{lead} points ahead in {100 * trials.highest(lead, spread):.0f}%" for lead in (2, 3, 5)]
    return (
        f"In one cell two rows' difference deviates from seed to seed by {spread[0]:.1f} points ID and {spread[1]:.1f} "
        f"OOD: were cells independent, a row truly ahead everywhere would be the highest in 8 of 9 cells, ID and OOD, "
        f"{', '.join(by_points)} of such studies."
    )


def _differences_in_cells(study: Study, rows: Sequence[Row], split: str) -> list[float]:
    """Of the baseline less each other row, in each cell, the deviation over the seeds, in points."""
    ends = {row_key(row): 100 * row[f"{split}_true"] for row in rows}
    others = [name for name in study.names("algorithm") if name != NINE.baseline]
    return [
        stdev(ends[(*place, NINE.baseline, seed)] - ends[(*place, name, seed)] for seed in study.names("seed"))
        for place in study.places
        for name in others
    ]


Claim = tuple[str, str, str]
"""What is claimed, whether it holds, and what the rows say."""


def _cell_claims(study: Study, rows: Sequence[Row]) -> list[Claim]:
    claims = []
    for split, sheet in zip(SPLITS, overviews(study, rows), strict=False):
        cells = len(sheet.columns) - 2
        highest = next(line[-1] for line in sheet.lines if line[0] == NINE.baseline)
        holds = _yes(int(highest.split()[0]) >= cells - 1)
        claims.append((f"`dvpo` is the highest in {cells - 1} of {cells} cells, {split.upper()}", holds, highest))
    return claims


def _contrast_claim(study: Study, rows: Sequence[Row]) -> Claim:
    found = contrasts(study, rows, NINE.baseline)
    corrected = holm([difference.p for _, _, difference in found])
    won, lost = (
        sum(sign * d.mean > 0 and p < LEVEL for (_, _, d), p in zip(found, corrected, strict=True)) for sign in (1, -1)
    )
    said = f"{won} of {len(found)} contrasts above 0 after correction, {lost} below"
    return "`dvpo` is above each other row, ID and OOD, over all cells", _yes(won == len(found)), said


def _clean_claim() -> Claim:
    """Whether clean rewards show a loss against any row: an interval that lies below 0."""
    study, rows = rows_of(CLEAN)
    claim = "clean rewards: no interval of `dvpo` less another row lies below 0"
    if len(rows) < len(study.cells):
        return claim, "open", f"{len(rows)} of {len(study.cells)} rows are there"
    found = contrasts(study, rows, CLEAN.baseline)
    below = sum(d.high < 0 for _, _, d in found)
    name, split, d = min(found, key=lambda line: line[2].low)
    lowest = f"the lowest end, against `{name}`, {split.upper()}: {difference_text(d)}"
    return claim, _yes(below == 0), f"{below} of {len(found)}; {lowest}"


def _random_claim() -> Claim:
    study, rows = rows_of(RANDOM)
    claim = "a fair coin: no row rises"
    if len(rows) < len(study.cells):
        return claim, "open", f"{len(rows)} of {len(study.cells)} rows are there"
    rising = [name for name in study.names("algorithm") if rise(study, rows, name).low > 0]
    return claim, _yes(not rising), f"rising: {', '.join(rising) or 'none'}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


# The pages


def block(text: str, inner: str) -> str:
    """The page with its block made anew."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n{inner}{text[end:]}"


def pages() -> dict[Path, str]:
    """What docs/results.md, docs/results_tables.md and their figures have to be."""
    last = (noise_predictions.section(), reward_information.section())
    return {
        PAGE: block(PAGE.read_text(), "\n".join([costs(), verdict(), glance(), *map(summary, REPORTING), *last])),
        TABLES: block(TABLES.read_text(), "\n".join(section(part) for part in (*REPORTING, *TUNING))),
        **{path: str(drawn) for part in REPORTING for path, drawn in figures(part).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
