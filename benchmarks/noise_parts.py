"""The parts of the noise study (docs/protocol.md) and of its tuning: which study each is, and which rows are there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from noise_figures import curves, differences, learning

from dvpo.study import Study, load_study
from dvpo.study_results import Row, last_quarter, read_results, row_key

ROOT = Path(__file__).parents[1]
STUDIES, ROWS = ROOT / "configs" / "studies", Path(__file__).parent / "results"

Draw = Callable[[Study, Sequence[Row]], Markup | None]


class Part(NamedTuple):
    """A study and the rows of it."""

    title: str
    study: Path
    rows: Path
    baseline: str
    only: str | None = None
    """The cells that are meant, as `dvpo study --only` takes them; None: all."""
    pooled: bool = True
    """Its noises may be averaged."""
    by_task: bool = False
    """Shown task by task as well."""
    rises: bool = False
    """Whether its rows end above their start is shown as well."""
    figures: Mapping[str, Draw] = {}
    """Name of a file -> what is in it."""
    note: str = ""
    """Said above its tables."""
    dial0: "Part | None" = None
    """The same with a starting model that was taught nothing about checking: shown beside it."""


LADDER = ("dvpo_plain", "dvpo_cons", "dvpo_cons_tail", "dvpo_cons_tail_shift", "dvpo_paper")


def reporting(title: str, name: str, **rest: Any) -> Part:
    return Part(title, STUDIES / f"{name}.yaml", ROWS / "noise_study.jsonl", **{"baseline": "dvpo"} | rest)


FURTHER = (
    "None of them had a trial of its own. With `norm: group` a correction is divided out again, so that "
    "`ppo_corrected` is `ppo`, and `rloo` is divided by the group's deviation; "
    "`rfqi_ppo` runs a formula that has been mended since. `dvpo_rank` of the method page is `dvpo`. Rows of `dvpo` "
    "were made on another type of machine than most others here."
)
UNPREDICTED = "No prediction had been written down for this part."
STILL = (
    "At this critic's rate, with a frozen trunk, a law hardly moves: the part says little about tails. "
    "[At the package's defaults](#tails-and-ladder-at-the-packages-defaults) it is asked again."
)
NINE_DIAL0 = reporting("Nine cells, checker dial 0", "noise_dial0", by_task=True, figures={"noise_dial0": differences})
NINE = reporting(
    "Nine cells, checker dial 1",
    "noise",
    by_task=True,
    note="With `norm: group` `dr_grpo` and `reinforce_pp` are divided by the group's deviation too.",
    dial0=NINE_DIAL0,
    figures={"noise": differences, "noise_curves_id": learning("id"), "noise_curves_ood": learning("ood")},
)
ONE_SETTING_DIAL0 = reporting(
    "Nine cells at one setting, checker dial 0",
    "noise_one_setting_dial0",
    by_task=True,
    figures={"noise_one_setting_dial0": differences},
)
CLEAN_DIAL0 = reporting(
    "Control: clean rewards, checker dial 0", "noise_controls_dial0", only="noise=clean", by_task=True
)
CLEAN = reporting("Control: clean rewards", "noise_controls", only="noise=clean", by_task=True, dial0=CLEAN_DIAL0)
RANDOM_DIAL0 = reporting(
    "Control: a fair coin for a reward, checker dial 0", "noise_controls_dial0", only="noise=random", rises=True
)
RANDOM = reporting(
    "Control: a fair coin for a reward", "noise_controls", only="noise=random", rises=True, dial0=RANDOM_DIAL0
)
REPORTING = [
    NINE,
    NINE_DIAL0,
    reporting("Flips, checker dial one half", "noise_dial_half"),
    reporting(
        "Nine cells at one setting",
        "noise_one_setting",
        by_task=True,
        figures={"noise_one_setting": differences},
        dial0=ONE_SETTING_DIAL0,
    ),
    ONE_SETTING_DIAL0,
    reporting(
        "Nine cells, dvpo at the setting of ppo",
        "noise_best_setting",
        baseline="dvpo_as_ppo",
        by_task=True,
        note="Only the rows of `dvpo_as_ppo` are new, made on a later generation of AMD EPYC. Those of the others are "
        "the nine cells', and had been seen.",
    ),
    reporting("Dialogues again at one setting, checker dial 0", "noise_again_dial0"),
    reporting("One sample a prompt", "noise_one_sample", figures={"noise_one_sample": differences}),
    reporting(
        "One sample a prompt at one setting",
        "noise_one_sample_setting",
        by_task=True,
        figures={"noise_one_sample_setting": differences, "noise_one_sample_setting_curves": learning("id")},
    ),
    reporting("One sample a prompt at one setting: flips", "noise_one_sample_flips", by_task=True),
    reporting("One sample a prompt at one setting: clipped rewards", "noise_one_sample_clip", by_task=True),
    CLEAN,
    CLEAN_DIAL0,
    RANDOM,
    RANDOM_DIAL0,
    reporting("Further rows", "noise_rest", note=FURTHER),
    reporting(
        "The paper's ladder, heavy tails",
        "noise_rest",
        baseline=LADDER[0],
        only="noise=heavy," + ",".join(f"algorithm={name}" for name in LADDER),
    ),
    reporting(
        "The paper's comparison at the package's defaults", "noise_defaults", baseline="dvpo_paper", by_task=True
    ),
    reporting("Tails and ladder at the package's defaults", "noise_defaults_sizes", baseline="dvpo_paper"),
    reporting("More flips and fewer", "noise_rates", pooled=False, figures={"noise_rates": curves}, note=UNPREDICTED),
    reporting("More noises", "noise_more", pooled=False, note=UNPREDICTED),
    reporting("Numbers of quantiles, sizes of tails", "noise_sizes", note=STILL),
    reporting("A model ten times as large", "noise_larger"),
    reporting("A model ten times as large: row or setting", "noise_larger_setting", baseline="dvpo_as_ppo"),
    reporting(
        "A model ten times as large: one sample a prompt",
        "noise_larger_one_sample",
        figures={"noise_larger_one_sample_curves": learning("id")},
    ),
    reporting("A model ten times as large: one sample a prompt, policy rates", "noise_larger_rates"),
]
TUNING = [
    Part(f"Tuning seeds: {path.stem}", path, ROWS / "tuning" / f"{path.stem}.jsonl", "")
    for path in sorted((STUDIES / "tuning").glob("*.yaml"))
]
TRIALS = next(part for part in TUNING if part.study.stem == "trials")


@cache
def study_at(path: Path, only: str | None = None) -> Study:
    return load_study(path, only=only)


rows_at = cache(read_results)
"""One file holds most parts: it is read once."""


def rows_of(part: Part) -> tuple[Study, list[Row]]:
    """The study, and those of its rows that are there, with the mean over their last quarter as their end."""
    study = study_at(part.study, part.only)
    wanted = {cell.key for cell in study.cells}
    return study, [last_quarter(row) for row in rows_at(part.rows) if row_key(row) in wanted]


def complete(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The rows of those seeds that have every cell: what may be pooled before a study is at its end."""
    there = {row_key(row) for row in rows}
    short = {cell.seed for cell in study.cells if cell.key not in there}
    return [row for row in rows if row["seed"] not in short]


def of_complete_seeds(study: Study, rows: Sequence[Row]) -> Study:
    """The study of those seeds alone, as if no others had been planned."""
    seeds = {row["seed"] for row in rows}
    return replace(study, cells=tuple(cell for cell in study.cells if cell.seed in seeds))


def whole_seeds(part: Part) -> tuple[Study, list[Row]]:
    """Study and rows of the seeds that have every cell."""
    study, rows = rows_of(part)
    rows = complete(study, rows)
    return of_complete_seeds(study, rows), rows
