"""The noise study keeps what its protocol promises: seeds apart, rows made again bit for bit, a page from rows."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dvpo.cli import main
from dvpo.noise import read_labels
from dvpo.stats import paired_difference
from dvpo.study import Study, load_study, read_study
from dvpo.study_results import read_results
from dvpo.study_table import make_report
from dvpo.tasks.math import ChainArithmetic
from dvpo.tasks.science import Science

ROOT = Path(__file__).resolve().parents[1]


def script(path: Path) -> ModuleType:
    """Import a script from its file: with its folder on the path, names of its neighbours would hide others."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = (
    *("reward_information", "noise_predictions", "noise_figures", "noise_parts", "trials", "noise_results"),
    "critic_seen",
)
with mock.patch.dict(sys.modules):  # each finds those before it
    for name in SCRIPTS:
        sys.modules[name] = script(ROOT / "benchmarks" / f"{name}.py")
    information, predictions, noise_figures, noise_parts, trials, noise_results, critic_seen = (
        sys.modules[n] for n in SCRIPTS
    )

STUDIES = ROOT / "configs" / "studies"
TUNING = sorted((STUDIES / "tuning").glob("*.yaml"))
REPORTING = sorted(STUDIES.glob("noise*.yaml"))
TUNING_SEEDS = set(range(1, 21))
TINY = (
    "steps=2",
    "sampling.prompts_per_step=4",
    "sampling.samples_per_prompt=2",
    "evaluation.every=1",
    "evaluation.prompts=4",
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def seeds_of(studies: list[Path]) -> set[int]:
    return {seed for path in studies for seed in read_study(path)["seeds"]}


def test_no_reporting_seed_occurs_in_any_tuning_file_or_row():
    reporting = seeds_of(REPORTING)
    assert min(reporting) > 100
    assert seeds_of(TUNING) <= TUNING_SEEDS
    rows = [row for path in (ROOT / "benchmarks/results/tuning").glob("*.jsonl") for row in read_results(path)]
    assert rows
    assert {row["seed"] for row in rows} <= TUNING_SEEDS
    assert {row["seed"] for row in read_results(noise_parts.REPORTING[0].rows)} <= reporting


def test_every_reporting_row_is_of_the_studies_own_settings_and_of_a_clean_commit():
    rows = read_results(noise_parts.REPORTING[0].rows)
    studies = [noise_parts.study_at(path) for path in REPORTING if rows]
    hashes = {(cell.key, cell.config_hash) for study in studies for cell in study.cells}
    for row in rows:
        assert ((row["task"], row["noise"], row["algorithm"], row["seed"]), row["config_hash"]) in hashes
        assert row["commit"]
        assert "dirty" not in row["commit"]


def test_every_training_prompt_that_can_be_voted_on_has_a_label():
    labels = read_labels(ROOT / "benchmarks/labels/untrained.jsonl")
    for task in (ChainArithmetic(), Science(ood_kind="untrained")):
        assert {example.id for example in task.split("train")} <= labels.keys()
        held_out = {example.id for name in ("id", "ood") for example in task.split(name)}
        assert not held_out & labels.keys()


@pytest.mark.slow
def test_a_row_of_the_study_is_made_again_bit_for_bit(tmp_path: Path):
    study = str(STUDIES / "noise.yaml")
    first, again = tmp_path / "first", tmp_path / "again"
    few = "task=math,noise=flip,noise=heavy,algorithm=dvpo,algorithm=grpo,seed=101"
    assert main(["study", study, f"output={first}", "--only", few, "--processes", "1", *TINY]) == 0
    one = "task=math,noise=flip,algorithm=dvpo,seed=101"
    assert main(["study", study, f"output={again}", "--only", one, "--processes", "1", *TINY]) == 0
    rows = {(row["noise"], row["algorithm"]): same(row) for row in read_results(first / "results.jsonl")}
    assert len(rows) == 4
    (row,) = read_results(again / "results.jsonl")
    assert json.dumps(same(row)) == json.dumps(rows["flip", "dvpo"])


def same(row: dict[str, Any]) -> dict[str, Any]:
    """What two equal runs share: all but where and when."""
    return {name: value for name, value in row.items() if name not in ("seconds", "machine", "commit")}


def test_the_results_pages_are_what_the_committed_rows_say():
    for path, text in noise_results.pages().items():
        assert path.read_text() == text, path


INTERVAL = re.compile(r"[-+]?\d*\.\d \[[-+]\d*\.\d, [-+]\d*\.\d\]")


def test_every_difference_that_is_quoted_stands_in_the_tables():
    page = noise_results.PAGE.read_text()
    begin, end = (page.index(mark) for mark in (noise_results.BEGIN, noise_results.END))
    made = {plainly(found) for found in INTERVAL.findall(page[begin:end])}
    others = [(ROOT / name).read_text() for name in ("README.md", "docs/choosing.md")]
    quoted = {plainly(found) for text in (page[:begin], page[end:], *others) for found in INTERVAL.findall(text)}
    assert quoted
    assert quoted <= made


def plainly(difference: str) -> str:
    """As prose has it: no 0 before the point, no plus before the mean."""
    return re.sub(r"(?<!\d)0\.", ".", difference).removeprefix("+")


def test_before_its_end_a_study_is_pooled_over_the_seeds_that_have_every_cell():
    study = load_study(STUDIES / "noise.yaml", only="task=math,noise=flip,noise=heavy,algorithm=dvpo,algorithm=ppo")
    (heavy, flip), seeds = ("heavy", "flip"), (101, 102, 103)
    scores = {heavy: {"dvpo": (80, 82, 90), "ppo": (70, 76, 80)}, flip: {"dvpo": (50, 60), "ppo": (50,)}}
    rows = [
        a_row(noise, name, seed, score)
        for noise, own in scores.items()
        for name, of_row in own.items()
        for seed, score in zip(seeds, of_row, strict=False)
    ]
    whole = noise_parts.complete(study, rows)
    assert [row["seed"] for row in whole] == [101] * 4
    pooled = make_report(noise_parts.of_complete_seeds(study, whole), whole, "ppo").sheets[2]
    lines = {line[0]: line for line in pooled.lines if line[1] == "ID"}
    assert lines["dvpo"][2] == "1"
    assert lines["dvpo"][4].startswith("65.0")  # 80 and 50, of seed 101 alone
    assert lines["ppo"][4].startswith("60.0")
    assert not noise_parts.complete(study, [row for row in rows if (row["noise"], row["seed"]) != (flip, 101)])


Gain = Callable[[str, str, int], float]
"""Task, noise and seed -> by how many points dvpo stands above everybody else."""


def replace_rows(monkeypatch: pytest.MonkeyPatch, rows_of: Callable[[Any], tuple[Study, list[dict[str, Any]]]]) -> None:
    for module in (noise_parts, noise_results):
        monkeypatch.setattr(module, "rows_of", rows_of)


def given(monkeypatch: pytest.MonkeyPatch, gain: Gain, without: tuple[str, ...] = ()) -> str:
    """The verdict on rows of all cells, but for noises without any."""

    def every_row(part: Any) -> tuple[Study, list[dict[str, Any]]]:
        study = noise_parts.study_at(part.study, part.only)
        rows = [
            a_row(noise, name, seed, 50 + (seed % 3) / 2 + (gain(task, noise, seed) if name == "dvpo" else 0))
            | {"task": task}
            for task, noise, name, seed in (cell.key for cell in study.cells)
            if noise not in without
        ]
        return study, [row | {"ood_true": row["id_true"], "ood_before": 0.9} for row in rows]

    replace_rows(monkeypatch, every_row)
    return noise_results.verdict()


def test_the_verdict_is_yes_where_all_of_the_protocol_holds(monkeypatch: pytest.MonkeyPatch):
    text = given(monkeypatch, lambda task, noise, seed: 5 + seed % 2)
    assert "(final).** None of those that are decided fails." in text
    for split in ("ID", "OOD"):
        assert f"| `dvpo` is the highest in 8 of 9 cells, {split} | yes | 9 of 9 |" in text
    assert "| yes | 12 of 12 contrasts above 0 after correction, 0 below |" in text
    assert "| yes | 0 of 12; the lowest end, against `ppo`, ID: +5." in text
    # Starts of 40 and 90, ends below 65: nobody rises.
    assert "| a fair coin: no row rises | yes | rising: none |" in text


def test_the_verdict_names_the_first_claim_that_fails(monkeypatch: pytest.MonkeyPatch):
    lost = {("math", "heavy"), ("science", "flip")}
    text = given(monkeypatch, lambda task, noise, seed: (-5 if (task, noise) in lost else 5) + seed % 2, ("random",))
    assert "The first that fails: `dvpo` is the highest in 8 of 9 cells, ID." in text
    assert "| `dvpo` is the highest in 8 of 9 cells, OOD | no | 7 of 9 |" in text
    assert "| yes | 12 of 12 contrasts" in text
    assert "| a fair coin: no row rises | open | 0 of 105 rows are there |" in text
    # In one cell of nine the lead is 0: nobody is the highest there, and eight are enough.
    tied = given(monkeypatch, lambda task, noise, seed: 0 if (task, noise) == ("math", "heavy") else 5 + seed % 2)
    assert "| `dvpo` is the highest in 8 of 9 cells, ID | yes | 8 of 9 |" in tied


def test_the_verdict_is_no_where_dvpo_loses_and_open_where_controls_are_missing(monkeypatch: pytest.MonkeyPatch):
    text = given(monkeypatch, lambda task, noise, seed: -5 - seed % 2, ("clean",))
    assert "| no | 0 of 12 contrasts above 0 after correction, 12 below |" in text
    assert "| open | 0 of 105 rows are there |" in text
    assert "| no | 12 of 12; the lowest end" in given(monkeypatch, lambda task, noise, seed: -5 - seed % 2)
    rising = given(monkeypatch, lambda task, noise, seed: 60 + seed % 2)
    assert "| a fair coin: no row rises | no | rising: dvpo |" in rising


def test_at_a_glance_stand_the_lead_over_ppo_and_over_the_row_that_ends_highest(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, lambda task, noise, seed: 5 + seed % 2, without=("clean",))
    rows_of = noise_parts.rows_of

    def with_a_higher_row(part: Any) -> tuple[Study, list[dict[str, Any]]]:
        study, rows = rows_of(part)
        higher = dict.fromkeys(("id_true", "ood_true"), 0.02)
        return study, [
            row | {name: row[name] + more for name, more in higher.items() if row["algorithm"] == "grpo"}
            for row in rows
        ]

    replace_rows(monkeypatch, with_a_higher_row)
    lines = {line.split("|")[1].strip(): line for line in noise_results.glance().splitlines() if line.startswith("| [")}
    # Seeds 101 to 112, six of them odd: 5.5 on average, less the 2 of the higher row.
    nine = [cell.strip() for cell in lines["[Nine cells, checker dial 1](#nine-cells-checker-dial-1)"].split("|")[2:-1]]
    assert [cell.split()[0] for cell in nine] == ["12", "+5.5", "+5.5", "`grpo`", "+3.5", "+3.5"]
    assert "| 0 of 5 |" in lines["[Control: clean rewards](#control-clean-rewards)"]
    assert not any("More noises" in line for line in lines)  # not to be averaged


def a_row(noise: str, name: str, seed: int, score: float) -> dict[str, Any]:
    curve = [[0, 0.4, None], [10, score / 100, None]]
    accuracies = {"id_before": 0.4, "ood_before": None, "id_true": score / 100, "ood_true": None}
    return {"task": "math", "noise": noise, "algorithm": name, "seed": seed, "curve": curve, **accuracies}


def test_the_deviation_of_paired_differences_equals_hand_arithmetic():
    # Differences at seeds 1, 2: 1 and 3 in task a, variance 2; 5 and 1 in b, variance 8; means 3 and 2, variance 1/2.
    one = {("a", 1): (11.0, 0.0), ("a", 2): (13.0, 0.0), ("b", 1): (25.0, 0.0), ("b", 2): (21.0, 0.0)}
    other = {("a", 1): (10.0, 0.0), ("a", 2): (10.0, 0.0), ("b", 1): (20.0, 0.0), ("b", 2): (20.0, 0.0)}
    assert trials.deviations({"one": one, "other": other}, [1, 2], 0) == pytest.approx((5**0.5, 0.5**0.5))
    assert trials.deviations({"one": one, "other": other}, [1, 2], 1) == (0.0, 0.0)
    assert trials.mean_of(one) == (11 + 13 + 25 + 21) / 8


def test_what_two_seeds_can_show_equals_hand_arithmetic():
    # Differences 1 and 3: sd 1.41; (t(.975) + t(.8)) sd / sqrt(2) = 12.706 + 1.376 with one degree of freedom.
    said = noise_results.resolution([paired_difference([1, 3], [0, 0])])
    assert "deviates by 1.4 to 1.4 points: 2 seeds" in said
    assert "of about 14.1 to 14.1 points" in said


def test_the_scatter_of_a_row_is_that_between_seeds_and_not_between_noises():
    # flip: 10, 20 -> 7.07; heavy: 50, 50 -> 0; the mean of both.
    ends = {"flip": (0.1, 0.2), "heavy": (0.5, 0.5)}
    rows = [
        {"task": "math", "noise": noise, "algorithm": "dvpo", "id_true": end}
        for noise, both in ends.items()
        for end in both
    ]
    study = load_study(STUDIES / "noise.yaml", only="task=math,noise=flip,noise=heavy,algorithm=dvpo")
    assert noise_results.scatter_of(study, rows, "math", "dvpo", "id") == pytest.approx(7.071 / 2, abs=1e-3)


def test_what_a_row_loses_after_its_peak_is_averaged_over_runs_and_paired_by_seed():
    # Ends 60 and 50 of peaks 70 and 80: -10, -30, mean -20; ppo 0 and -10, mean -5. Paired: -10 and -20, mean -15,
    # sd 7.07, half = t(1) 12.706 * 7.07 / sqrt 2 = 63.5.
    study = load_study(STUDIES / "noise.yaml", only="task=math,noise=flip,algorithm=dvpo,algorithm=ppo")
    study = noise_parts.of_complete_seeds(study, [{"seed": 101}, {"seed": 102}])
    rows = [
        {**row, "curve": [[0, 0.4, 0.4], [10, peak / 100, 0.5], [20, end / 100, 0.5]], "ood_true": 0.5}
        for name, runs in {"dvpo": ((70, 60), (80, 50)), "ppo": ((60, 60), (70, 60))}.items()
        for seed, (peak, end) in zip((101, 102), runs, strict=True)
        for row in [a_row("flip", name, seed, end)]
    ]
    sheet = noise_results.stability_sheet(noise_results.NINE, study, rows)
    assert sheet.lines[0] == ("dvpo", "-20.0", "+0.0", "-", "-")
    assert sheet.lines[1] == ("ppo", "-5.0", "+0.0", "-15.0 [-78.5, +48.5]", "+0.0 [+0.0, +0.0]")


def test_what_critics_saw_is_the_first_step_and_the_mean_of_the_last_fifth_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    study = load_study(STUDIES / "noise.yaml", only="task=math,noise=flip,seed=101,seed=102,algorithm=dvpo")
    for cell, high in zip(study.cells, (0.5, 0.7), strict=True):
        cell.folder.mkdir(parents=True)
        widths = [high, *[0.0] * 7, 0.2, 0.4]  # of ten steps the last two: .3
        rows = [{"step": step, "critic/spread": width} for step, width in enumerate(widths, start=1)]
        rows.insert(1, {"step": 1, "eval/id/accuracy": 0.5})
        (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = critic_seen.seen(study)
    assert (line["algorithm"], line["seeds"]) == ("dvpo", 2)
    assert (line["first"], line["last"]) == ({"spread": 0.6}, {"spread": 0.3})


def test_the_figure_shows_each_contrast_where_its_mean_is():
    study = load_study(STUDIES / "noise.yaml", only="task=math,noise=flip,algorithm=dvpo,algorithm=ppo")
    rows = [
        {"task": "math", "noise": "flip", "algorithm": name, "seed": seed, "id_true": score / 100, "ood_true": None}
        for name, scores in {"dvpo": (80, 82, 90), "ppo": (70, 76, 80)}.items()
        for seed, score in zip((101, 102, 103), scores, strict=True)
    ]
    ((name, split, difference),) = noise_figures.contrasts(study, rows, "dvpo")
    assert (name, split, difference.pairs) == ("ppo", "id", 3)
    assert difference.mean == pytest.approx((10 + 6 + 10) / 3)
    assert "ppo, ID (3)" in str(noise_figures.differences(study, rows))
    assert noise_figures.differences(study, rows[:1]) is None


def test_the_curves_are_drawn_as_soon_as_an_algorithm_has_two_noises():
    study = load_study(STUDIES / "noise_rates.yaml", only="algorithm=dvpo,seed=101")
    rows = [a_row(noise, "dvpo", 101, score) for noise, score in (("clean", 80), ("flip", 60))]
    drawn = str(noise_figures.curves(study, rows))
    assert drawn.count("<circle") == 2
    assert "True accuracy, in distribution (%)" in drawn
    assert noise_figures.curves(study, rows[:1]) is None


# The predictions


def test_the_words_of_a_prediction_follow_from_its_intervals():
    # Differences 4 5 6: mean 5, sd 1, t(2) = 4.303 (95%), half = 4.303 / sqrt 3 = 2.48.
    assert predictions.said([4, 5, 6]) == "+5.0 [+2.5, +7.5] above 0"
    assert predictions.said([-4, -5, -6]) == "-5.0 [-7.5, -2.5] below 0"
    # 0 .5 1: half .5 * 2.48 = 1.24 at 95%; at 90% t = 2.92, half .84: within 2.
    assert predictions.said([0, 0.5, 1]) == "+0.5 [-0.7, +1.7] equal"
    assert predictions.said([1.0, 1.1, 1.2]).endswith("above 0, equal")
    assert predictions.said([-5, 0, 6]).endswith("undecided")


def test_a_prediction_pairs_seeds_over_its_cells():
    gains = {"heavy": 6.0, "labels": 1.0, "flip": 0.0}
    rows = [
        {"task": task, "noise": noise, "algorithm": name, "seed": seed, "corr": None,
         "id_true": 0.5 + (name == "dvpo") * (gain + seed % 2) / 100, "ood_true": 0.4}
        for noise, gain in gains.items()
        for task in predictions.TASKS
        for name in ("dvpo", "ppo_ensemble")
        for seed in predictions.TWELVE
    ]  # fmt: skip
    # ID alone differs, so half of it: heavy 3 + half of seed % 2, less (0 + .5) / 2 and the same half: 2.75 always.
    assert predictions.outliers(predictions.Table(rows)).startswith(
        "heavy less others +2.8 [+2.8, +2.8] above 0; flip +0.2"
    )
    with pytest.raises(predictions.MissingRowError):
        predictions.outliers(predictions.Table(rows[:-1]))
    with pytest.raises(predictions.MissingRowError):
        predictions.functional(predictions.Table(rows))


def test_both_splits_stand_apart_and_a_lead_is_that_of_the_step_that_is_asked_for():
    rows = [
        {"task": "dialogue", "noise": noise, "algorithm": name, "seed": seed,
         "id_true": 0.5 + lead, "ood_true": 0.5 + 2 * lead, "curve": [[15, 0.5 + lead, 0.5], [30, 0.5, 0.5]]}
        for noise in predictions.NOISES
        for seed in predictions.TWELVE
        for name, lead in (("dvpo", 0.03), ("ppo", 0.0))
    ]  # fmt: skip
    table, where = predictions.Table(rows), predictions.cells_of("dialogue")
    apart = predictions.by_split(table, where, "dvpo", "ppo", predictions.TWELVE)
    assert apart == "ID +3.0 [+3.0, +3.0] above 0, OOD +6.0 [+6.0, +6.0] above 0"
    # ID alone leads at step 15: half of 3.
    seen = predictions.early_in_dialogues(table)
    assert seen.startswith("at step 15 +1.5 [+1.5, +1.5] above 0, equal; at step 30 ")


def test_spearmans_rho_is_that_of_ranks():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert predictions.spearman(x, np.exp(x)) == pytest.approx(1.0)
    # Ranks 0 1 2 3 against 1 0 2 3: 1 - 6 * 2 / (4 * 15) = .8.
    assert predictions.spearman(x, np.array([[2.0, 1.0], [3.0, 4.0]])) == pytest.approx(0.8)


# What a reward is worth


def test_a_clean_reward_less_its_chance_is_worth_one_rollout_and_nothing_passes_the_ceiling(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(information, "PROMPTS", 1000)
    parts = information.measure()
    assert parts["one sample, an exact critic"]["ppo"]["clean"] == pytest.approx(1.0, abs=1e-3)
    # Flips of .4 leave .2 of the covariance s (1 - s), whose mean over the chances is .17; the variance at a prompt is
    # .25 - .04 (1/4 - s (1 - s)): .04 * .17 / (.25 - .04 * .08) = .0276 for an exact critic.
    assert parts["one sample, an exact critic"]["ppo"]["flip"] == pytest.approx(0.0276, abs=0.008)
    for part in ("one sample", "groups of eight"):
        for noise, most in parts[part][information.CEILING].items():
            # Of a sample, so that the projection is not exactly the highest.
            assert all(row[noise] < most + 0.01 for row in parts[part].values()), (part, noise)


def test_the_rank_in_a_prompts_own_law_is_that_among_many_rewards_of_it():
    chances = torch.full((1,), 0.3, dtype=torch.float64)
    truth = (torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    for noise in ("flip", "student", "heavy"):
        case = information.case(truth, chances, noise)
        ordered = case.seen[0].sort().values
        below, upto = (torch.searchsorted(ordered, case.seen[0], right=right) for right in (False, True))
        counted = (below + upto) / 2 / len(ordered) - 0.5
        # A share of 20,000 has a standard error of .0035 at most.
        torch.testing.assert_close(information.ranked_in_own_law(case)[0], counted.double(), atol=0.015, rtol=0)
