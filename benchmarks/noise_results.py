"""Every table and figure of docs/results.md, from the committed rows alone; nothing is trained.

    make results

A study that has not all of its rows yet is shown with what is there, and says so.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import trials
from markupsafe import Markup

from dvpo.stats import PairedDifference
from dvpo.study import Study, load_study
from dvpo.study_results import Row, last_quarter, read_results, row_key
from dvpo.study_table import NONE, Report, compare, make_report, to_markdown

ROOT = Path(__file__).parents[1]
STUDIES, ROWS = ROOT / "configs" / "studies", Path(__file__).parent / "results"
PAGE, FIGURE = ROOT / "docs" / "results.md", ROOT / "docs" / "images" / "noise_study.svg"
BEGIN, END = "<!-- results: written by make results -->", "<!-- /results -->"


class Part(NamedTuple):
    """A study and the rows of it."""

    title: str
    study: Path
    rows: Path
    baseline: str
    only: str | None = None
    """The cells that are meant, as `dvpo study --only` takes them; None: all."""


LADDER = ("dvpo_plain", "dvpo_cons", "dvpo_cons_tail", "dvpo_cons_tail_shift", "dvpo_paper")
REPORTING = [
    Part(title, STUDIES / f"{name}.yaml", ROWS / "noise_study.jsonl", "dvpo")
    for title, name in {
        "Nine cells, checker dial 1": "noise",
        "Nine cells, checker dial 0": "noise_dial0",
        "Flips, checker dial one half": "noise_dial_half",
        "One sample a prompt": "noise_one_sample",
        "Controls": "noise_controls",
        "Further rows": "noise_rest",
        "More flips and fewer": "noise_rates",
        "More noises": "noise_more",
        "Numbers of quantiles, sizes of tails": "noise_sizes",
        "A model ten times as large": "noise_larger",
    }.items()
]
REPORTING.append(
    Part(
        "The paper's ladder, heavy tails",
        STUDIES / "noise_rest.yaml",
        ROWS / "noise_study.jsonl",
        LADDER[0],
        "noise=heavy," + ",".join(f"algorithm={name}" for name in LADDER),
    )
)
TUNING = [
    Part(f"Tuning seeds: {path.stem}", path, ROWS / "tuning" / f"{path.stem}.jsonl", "")
    for path in sorted((STUDIES / "tuning").glob("*.yaml"))
]
TRIALS = next(part for part in TUNING if part.study.stem == "trials")


@cache
def study_at(path: Path, only: str | None = None) -> Study:
    return load_study(path, only=only)


def rows_of(part: Part) -> tuple[Study, list[Row]]:
    """The study, and those of its rows that are there, with the mean over their last quarter as their end."""
    study = study_at(part.study, part.only)
    wanted = {cell.key for cell in study.cells}
    return study, [last_quarter(row) for row in read_results(part.rows) if row_key(row) in wanted]


def complete(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The rows of those seeds that have every cell: what may be pooled before a study is at its end."""
    there = {row_key(row) for row in rows}
    short = {cell.seed for cell in study.cells if cell.key not in there}
    return [row for row in rows if row["seed"] not in short]


def tables(study: Study, rows: Sequence[Row], baseline: str, notes: bool) -> Report:
    """The study's tables, lines without a row left out; the pooled one is of complete seeds alone."""
    report = make_report(study, rows, baseline)
    places = len({(cell.task, cell.noise) for cell in study.cells})
    sheets, whole = list(report.sheets[:places]), complete(study, rows)
    if places > 1 and whole:
        pooled = (report if len(whole) == len(rows) else make_report(study, whole, baseline)).sheets[places]
        seeds = len({row["seed"] for row in whole})
        sheets.append(replace(pooled, title=f"{pooled.title}; seeds that have every cell: {seeds}"))
    shown = [replace(sheet, lines=tuple(line for line in sheet.lines if line[3] != NONE)) for sheet in sheets]
    return Report(tuple(sheet for sheet in shown if sheet.lines), report.notes if notes else ())


def section(part: Part) -> str:
    """What is there of a study, and its tables."""
    study, rows = rows_of(part)
    place, source = (path.relative_to(ROOT) for path in (part.rows, part.study))
    link = f"[`{place}`](../{place})" if part.rows.exists() else f"`{place}`"
    text = (
        f"### {part.title}\n\n{len(rows)} of {len(study.cells)} rows are there ({link}, of [`{source}`](../{source}))"
    )
    if not rows:
        return f"{text}. It has not begun: there is no table.\n"
    baseline = part.baseline or study.names("algorithm")[0]
    commits = ", ".join(sorted({str(row["commit"])[:7] for row in rows}))
    seconds = sum(row["seconds"] for row in rows)
    text += f". Made at {commits} on {', '.join(sorted({row['machine'] for row in rows}))}, one thread a run, "
    text += f"{seconds / 3600:.1f} hours in all.\n\n"
    if part is TRIALS:
        return (
            text
            + "ID / OOD of each task, means over the seeds; `dvpo` is the mean of the law here.\n\n"
            + "\n".join(trials.summary(study, rows))
            + "\n"
        )
    return text + to_markdown(tables(study, rows, baseline, notes=part is REPORTING[0]))


# The figure: what dvpo ended above each other row, over all places.


def contrasts(study: Study, rows: Sequence[Row], first: str) -> list[tuple[str, str, PairedDifference]]:
    """(algorithm, split, first less that algorithm) over the pairs that are there, of seeds complete in all places."""
    others = [name for name in study.names("algorithm") if name != first]
    found = []
    for name in others:
        for split in ("id", "ood"):
            difference = compare(study, rows, first, name, split)
            if difference is not None:
                found.append((name, split, difference))
    return found


def figure(study: Study, rows: Sequence[Row], first: str = "dvpo") -> Markup | None:
    """A line a contrast with its 95% interval, as an SVG that needs no style sheet; None if nothing can be compared."""
    lines = [line for line in contrasts(study, rows, first) if line[2].pairs > 1]
    if not lines:
        return None
    reach = max(5.0, *(abs(end) for _, _, d in lines for end in (d.low, d.high)))
    width, left, height = 640, 190, 50 + 22 * len(lines)

    def x(value: float) -> float:
        return round(left + (value + reach) / (2 * reach) * (width - left - 20), 1)

    body = [Markup('<path d="M{0} 10V{1}" stroke="#888"/>').format(x(0), height - 34)]
    for place, (name, split, difference) in enumerate(lines):
        y = 24 + 22 * place
        body.append(
            Markup(
                '<text x="8" y="{0}">{1}, {2} ({3})</text><path d="M{4} {5}H{6}" stroke="#27b" stroke-width="2"/>'
                '<circle cx="{7}" cy="{5}" r="4" fill="#27b"/>'
            ).format(y + 4, name, split.upper(), difference.pairs, x(difference.low), y, x(difference.high),
                     x(difference.mean))
        )  # fmt: skip
    for tick in (-reach, 0.0, reach):
        body.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            x(tick) if abs(tick) < reach else x(tick * 0.95), height - 18, f"{tick:+.1f}"))  # fmt: skip
    title = f"{first} less each row, points of true accuracy over all places, paired by seed (number of pairs)"
    body.append(Markup('<text x="8" y="{}">{}</text>').format(height - 3, title))
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" font-family="sans-serif" font-size="12">'
        '<rect width="{0}" height="{1}" fill="white"/>{2}</svg>\n'
    ).format(width, height, Markup("").join(body))


def headline() -> Markup | None:
    """The figure of the nine cells, if their rows can be compared."""
    return figure(*rows_of(REPORTING[0]))


def page(text: str) -> str:
    """The page with its block made anew."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    drawn = f"![Paired differences]({FIGURE.relative_to(PAGE.parent)})\n\n" if headline() else ""
    parts = "\n".join(section(part) for part in (*REPORTING, *TUNING))
    return f"{text[:begin]}\n{drawn}{parts}{text[end:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(page(PAGE.read_text()))
    drawn = headline()
    if drawn is not None:
        FIGURE.write_text(drawn)
    else:
        FIGURE.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
