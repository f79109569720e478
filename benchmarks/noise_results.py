"""Every table and figure of docs/results.md and docs/results_tables.md, from the committed rows; nothing is trained.

    make results

A study that has not all of its rows yet is shown with what is there, and says so.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import trials
from markupsafe import Markup
from noise_figures import contrasts, curves, differences

from dvpo.stats import holm
from dvpo.study import Study, load_study
from dvpo.study_results import Row, last_quarter, read_results, row_key
from dvpo.study_table import NONE, SPLITS, Report, Sheet, make_report, overviews, to_markdown

ROOT = Path(__file__).parents[1]
STUDIES, ROWS = ROOT / "configs" / "studies", Path(__file__).parent / "results"
DOCS = ROOT / "docs"
PAGE, TABLES = DOCS / "results.md", DOCS / "results_tables.md"
BEGIN, END = "<!-- results: written by make results -->", "<!-- /results -->"


class Part(NamedTuple):
    """A study and the rows of it."""

    title: str
    study: Path
    rows: Path
    baseline: str
    only: str | None = None
    """The cells that are meant, as `dvpo study --only` takes them; None: all."""
    draw: Callable[[Study, Sequence[Row]], Markup | None] | None = None
    """Its figure."""

    @property
    def figure(self) -> Path:
        return DOCS / "images" / f"{self.study.stem}.svg"


LADDER = ("dvpo_plain", "dvpo_cons", "dvpo_cons_tail", "dvpo_cons_tail_shift", "dvpo_paper")
REPORTING = [
    Part(title, STUDIES / f"{name}.yaml", ROWS / "noise_study.jsonl", "dvpo", draw=draw)
    for title, name, draw in (
        ("Nine cells, checker dial 1", "noise", differences),
        ("Nine cells, checker dial 0", "noise_dial0", differences),
        ("Flips, checker dial one half", "noise_dial_half", None),
        ("One sample a prompt", "noise_one_sample", differences),
        ("Controls", "noise_controls", None),
        ("Further rows", "noise_rest", None),
        ("More flips and fewer", "noise_rates", curves),
        ("More noises", "noise_more", None),
        ("Numbers of quantiles, sizes of tails", "noise_sizes", None),
        ("A model ten times as large", "noise_larger", None),
    )
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
NINE, CONTROLS = REPORTING[0], REPORTING[4]
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


def of_complete_seeds(study: Study, rows: Sequence[Row]) -> Study:
    """The study of those seeds alone, as if no others had been planned."""
    seeds = {row["seed"] for row in rows}
    return replace(study, cells=tuple(cell for cell in study.cells if cell.seed in seeds))


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
        return f"{text}. It has not begun: there is no table.\n", rows
    commits = ", ".join(sorted({str(row["commit"])[:7] for row in rows}))
    seconds = sum(row["seconds"] for row in rows)
    text += f". Made at {commits} on {', '.join(sorted({row['machine'] for row in rows}))}, one thread a run, "
    return f"{text}{seconds / 3600:.1f} hours in all.\n\n", rows


def summary(part: Part) -> str:
    """All its places side by side, and pooled: over the seeds that have every cell."""
    text, rows = head(part)
    study = study_at(part.study, part.only)
    whole = complete(study, rows)
    if not rows or not whole:
        return text + ("No seed has every cell yet.\n" if rows else "")
    study = of_complete_seeds(study, whole)
    planned = len(study_at(part.study, part.only).names("seed"))
    text += f"Seeds that have every cell: {len(study.names('seed'))} of {planned}.\n\n"
    drawn = part.draw and part.draw(study, whole)
    if drawn:
        text += f"![{part.title}]({part.figure.relative_to(DOCS)})\n\n"
    baseline = part.baseline or study.names("algorithm")[0]
    places = len({(cell.task, cell.noise) for cell in study.cells})
    pooled = make_report(study, whole, baseline).sheets[0 if places == 1 else places]
    return text + to_markdown(Report((pooled, *overviews(study, whole)), ()))


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
    places = len({(cell.task, cell.noise) for cell in study.cells})
    pooled = report.sheets[places:] if len(complete(study, rows)) == len(rows) and part in TUNING else ()
    sheets = [_with_rows(sheet) for sheet in (*report.sheets[:places], *pooled)]
    return text + to_markdown(Report(tuple(sheet for sheet in sheets if sheet.lines), ()))


def _with_rows(sheet: Sheet) -> Sheet:
    return replace(sheet, lines=tuple(line for line in sheet.lines if line[3:4] != (NONE,)))


# What the protocol asks


def verdict() -> str:
    """The protocol's claims, each with what the rows say: of complete seeds, and final only with all of them."""
    study, rows = rows_of(NINE)
    rows = complete(study, rows)
    if not rows:
        return ""
    planned, study = len(study.names("seed")), of_complete_seeds(study, rows)
    seeds = len(study.names("seed"))
    when = "final" if seeds == planned else f"interim, {seeds} of {planned} seeds, nothing is concluded"
    lines = [f"**What the protocol asks ({when})**", "", "| claim | holds | what the rows say |", "|---|---|---|"]
    for split, sheet in zip(SPLITS, overviews(study, rows), strict=False):
        cells = len(sheet.columns) - 2
        highest = next(line[-1] for line in sheet.lines if line[0] == NINE.baseline)
        holds = int(highest.split()[0]) >= cells - 1
        lines.append(_claim(f"highest in {cells - 1} of {cells} cells, {split.upper()}", holds, highest))
    found = contrasts(study, rows, NINE.baseline)
    corrected = holm([difference.p for _, _, difference in found])
    won = [d.mean > 0 and p < 0.05 for (_, _, d), p in zip(found, corrected, strict=True)]
    lost = [d.mean < 0 and p < 0.05 for (_, _, d), p in zip(found, corrected, strict=True)]
    said = f"{sum(won)} of {len(found)} contrasts above 0 after correction, {sum(lost)} below"
    lines.append(_claim("above each other row, ID and OOD", all(won), said))
    lines.append(_clean_claim())
    return "\n".join(lines) + "\n\n"


def _clean_claim() -> str:
    """Whether clean rewards show no loss against any row: no interval lies below 0."""
    claim = "clean rewards: no loss against any row"
    study = study_at(CONTROLS.study, "noise=clean")
    there = {cell.key for cell in study.cells}
    rows = complete(study, [row for row in rows_of(CONTROLS)[1] if row_key(row) in there])
    if not rows:
        return f"| {claim} | open | no seed has its three cells yet |"
    found = contrasts(study, rows, CONTROLS.baseline)
    worst = min(found, key=lambda line: line[2].high)
    low = sum(difference.high < 0 for _, _, difference in found)
    said = f"{low} of {len(found)} intervals below 0; the lowest is against {worst[0]}, {worst[1].upper()}: "
    return _claim(claim, low == 0, f"{said}{worst[2].mean:+.1f} [{worst[2].low:+.1f}, {worst[2].high:+.1f}]")


def _claim(claim: str, holds: bool, said: str) -> str:
    return f"| {claim} | {'yes' if holds else 'no'} | {said} |"


# The pages


def block(text: str, inner: str) -> str:
    """The page with its block made anew."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n{inner}{text[end:]}"


def pages() -> dict[Path, str]:
    """What docs/results.md and docs/results_tables.md have to be."""
    return {
        PAGE: block(PAGE.read_text(), verdict() + "\n".join(summary(part) for part in REPORTING)),
        TABLES: block(TABLES.read_text(), "\n".join(section(part) for part in (*REPORTING, *TUNING))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for path, text in pages().items():
        path.write_text(text)
    for part in REPORTING:
        study, rows = rows_of(part)
        drawn = part.draw and part.draw(study, complete(study, rows))
        if drawn:
            part.figure.write_text(drawn)
        else:
            part.figure.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
