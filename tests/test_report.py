"""Reports: what is read, how runs become lines, and that a page is whole, small and harmless."""

import base64
import hashlib
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from dvpo import Trainer, report_texts
from dvpo.cli import main
from dvpo.errors import InputError
from dvpo.plain_text import clipped, visible
from dvpo.report import about, run_folders, study_page, write_report
from dvpo.report_data import Run, place_of_runs, places_of_study, read_run, series_names
from dvpo.report_panels import fault_lines, learning_panel, over_seeds, smoothed
from dvpo.report_study import noise_axis, robustness_panels
from dvpo.report_summary import summary_table
from dvpo.report_texts import page_data, script_json
from dvpo.report_words import ends, sentences
from dvpo.study import load_study
from dvpo.study_results import read_results, row_key
from report_runs import HOSTILE, write_run
from runs import Parity, Talk, run_config
from study_files import a_row

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Tags and ids of a page, the scripts it would run, its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.scripts: list[str] = []
        self.data: Any = None
        self.policy = ""
        self.loads: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        self.ids.add(values.get("id") or "")
        self._inside = f"{tag} {values.get('type', '')}"
        self.loads += [value for key in ("src", "href") if (value := values.get(key)) and value[0] != "#"]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""

    def handle_data(self, text: str) -> None:
        self.text += text
        if self._inside == "script ":
            self.scripts.append(text)
        elif self._inside == "script application/json":
            self.data = json.loads(text)
        self._inside = ""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("runs")
    file = write_report([str(write_run(folder / name, name)) for name in ("dvpo", "ppo")])
    assert file == folder / "report.html"
    return Page(file.read_text(encoding="utf-8"))


# The page


def test_a_page_has_every_panel_and_loads_nothing(page: Page):
    assert {"summary", "learning", "critic", "policy", "faults", "completions", "tokens", "about"} <= page.ids
    assert page.loads == ["data:,"]
    assert "default-src 'none'" in page.policy


def test_the_policy_names_the_one_script_by_its_hash(page: Page):
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_completion_reaches_the_page_as_data_alone(page: Page, name: str):
    rows = [row for row in page.data["completions"] if row["id"] == name]
    assert [row["text"] for row in rows] == [visible(HOSTILE[name])] * 2
    assert page.tags.count("script") == 2
    assert page.tags.count("style") == 1
    assert "img" not in page.tags


def test_a_hostile_fault_is_shown_as_text(page: Page):
    for text in HOSTILE.values():
        assert clipped(visible(text), 500).strip() in page.text


def test_no_text_can_end_the_element_that_carries_it():
    text = script_json(["</script><!--", "&lt;"])
    assert not set("<>&") & set(text)
    assert json.loads(text) == ["</script><!--", "&lt;"]


def test_a_real_run_makes_a_page_without_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = run_config(tmp_path / "run", "steps=3", "log.tokens=1", "evaluation.every=1")
    Trainer(config, task=Parity()).train()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        folder.rename(tmp_path / folder.name)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "run/report.html" in capsys.readouterr().out.replace("\n", "")
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert [row["view"] for row in page.data["completions"] if row["view"] >= 0] == [0, 1, 2]
    assert page.tags.count("svg") > 15


def test_a_long_run_stays_below_five_megabytes_and_says_what_it_leaves_out(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={"a": "word " * 400})
    (row,) = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    rows = [{**row, "step": step, "sample": sample} for step in range(1, 2001) for sample in range(4)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = write_report([str(folder)])
    assert file.stat().st_size < 5_000_000
    left_out = Page(file.read_text()).data["left_out"]["completions"]
    assert left_out > 5000
    assert f"{left_out} logged completions" in file.read_text()


# Reading


def test_runs_that_differ_in_their_seed_alone_are_one_series(tmp_path: Path):
    folders = [write_run(tmp_path / f"{name}{seed}", name, {}, seed) for name in ("dvpo", "ppo") for seed in (1, 2)]
    place = place_of_runs(folders)
    assert [(series.name, [run.seed for run in series.runs]) for series in place.series] == [
        ("dvpo", [1, 2]),
        ("ppo", [1, 2]),
    ]


def test_a_seed_that_was_run_again_is_no_further_seed(tmp_path: Path):
    place = place_of_runs([write_run(tmp_path / name, "dvpo", {}, seed=0) for name in ("first", "again")])
    assert [(series.name, len(series.runs)) for series in place.series] == [("dvpo", 1), ("dvpo (2)", 1)]


def test_the_about_table_names_all_that_made_a_resumed_run(tmp_path: Path):
    manifest = {"commit": "abc", "machine": {"cpu": "one"}, "versions": {"torch": "2.1"}, "resumes": [
        {"step": 2, "commit": "abc", "machine": {"cpu": "two"}, "dirty": True}]}  # fmt: skip
    line = about(replace(read_run(write_run(tmp_path / "run", texts={})), manifest=manifest))
    assert (line["commit"], line["machine"]) == ("abc; then abc, with uncommitted changes", "one; then two")
    assert line["versions"] == "torch 2.1"


def test_an_evaluation_without_any_reward_lends_its_interval_to_no_other(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={})
    rows = [
        {"step": 0, "eval/id/accuracy": None, "eval/id/accuracy_low": 0.0, "eval/id/accuracy_high": 1.0},
        {"step": 2, "eval/id/accuracy": 0.5, "eval/id/accuracy_low": 0.4, "eval/id/accuracy_high": 0.6},
        {"step": 4, "eval/id/accuracy": 0.7, "eval/id/accuracy_low": 0.6, "eval/id/accuracy_high": 0.8},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = place_of_runs([folder])
    table = summary_table(place)
    line = dict(zip(table.columns, table.lines[0], strict=True))
    assert (line["ID before"], line["ID after"]) == ("50.0 [40, 60]", "70.0 [60, 80]")
    (curve,) = learning_panel(place).charts[0].lines
    assert [x for x, _ in curve.low] == [x for x, _ in curve.points] == [2, 4]


def test_series_of_one_algorithm_are_told_apart_by_their_settings(tmp_path: Path):
    folders = [write_run(tmp_path / name, "dvpo", {}) for name in ("a", "b")]
    config = (folders[1] / "config.yaml").read_text().replace("alpha: 0.1", "alpha: 0.3")
    (folders[1] / "config.yaml").write_text(config)
    assert [s.name for s in place_of_runs(folders).series] == ["dvpo, critic.alpha=0.1", "dvpo, critic.alpha=0.3"]


def test_no_two_series_have_one_name(tmp_path: Path):
    noises = ({"noise.kind": "flip", "noise.rate": 0.2}, {"noise.kind": "student_t", "noise.df": 1, "noise.scale": 0.5},
              {"noise.kind": "student_t", "noise.df": 1, "noise.scale": 1.0})  # fmt: skip
    none = dict.fromkeys(("noise.kind", "noise.rate", "noise.df", "noise.scale"))
    runs = [Run("dvpo", 0, None, {**none, **noise}) for noise in noises]
    names = series_names(runs)
    assert "noise.scale=0.5" in names[1]
    assert "noise.scale=1.0" in names[2]
    # A setting that an older run does not know yet, at its default of None.
    assert series_names([Run("ppo", 0, None, {}), Run("ppo", 0, None, {"new": None})]) == ["ppo", "ppo (2)"]


def test_a_folder_of_runs_stands_for_the_runs_in_it(tmp_path: Path):
    folders = [write_run(tmp_path / name, name, {}) for name in ("dvpo", "ppo")]
    assert run_folders([str(tmp_path)]) == folders


def test_bad_input_is_one_sentence(tmp_path: Path):
    run = str(write_run(tmp_path / "run", texts={}))
    with pytest.raises(InputError, match="holds no run"):
        write_report([str(tmp_path / "nothing")])
    with pytest.raises(InputError, match="named twice"):
        write_report([run, run])
    with pytest.raises(InputError, match=r"let it end in \.html"):
        write_report([run], output=str(tmp_path / "report.txt"))
    with pytest.raises(InputError, match="make it, or name another file"):
        write_report([run], output=str(tmp_path / "no" / "report.html"))
    with pytest.raises(InputError, match="--results"):
        write_report([run], results="rows.jsonl")


def test_a_baseline_that_is_not_there_is_refused_and_only_the_usual_one_replaced(tmp_path: Path):
    runs = [str(write_run(tmp_path / name, name, {})) for name in ("grpo", "dvpo")]
    with pytest.raises(InputError, match="--baseline = grop is no algorithm of these runs: take one of grpo; dvpo"):
        write_report(runs, baseline="grop")
    study, rows = str(ROOT / "configs/studies/tiny.yaml"), str(study_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(InputError, match="--baseline = grop is no algorithm of these cells: take one of "):
        write_report([study], results=rows, baseline="grop")
    with pytest.raises(InputError, match="--baseline = ppo is no algorithm of these runs"):
        write_report(runs, baseline="ppo")
    assert "dvpo against grpo" in write_report(runs).read_text()
    assert "grpo against dvpo" in write_report(runs, baseline="dvpo").read_text()


# Lines


def test_an_interval_over_seeds_is_students():
    # Mean 2, sd 1, n = 3, t(2 degrees) = 4.302653: 2 -+ 4.302653 / sqrt(3) = 2 -+ 2.484138.
    low, middle, high = over_seeds([[(0.0, 1.0)], [(0.0, 2.0)], [(0.0, 3.0), (1.0, 9.0)]])
    assert middle == [(0.0, 2.0)]  # only steps that all seeds have
    assert low[0][1] == pytest.approx(-0.484138, abs=1e-5)
    assert high[0][1] == pytest.approx(4.484138, abs=1e-5)


def test_a_running_mean_is_centred_and_keeps_the_level():
    points = [(float(i), float(i % 2)) for i in range(100)]  # 100 points: two to either side
    assert smoothed(points)[50] == (50.0, pytest.approx(0.4))  # 0 1 0 1 0
    assert smoothed([(0.0, 5.0), (1.0, 7.0)]) == [(0.0, 5.0), (1.0, 7.0)]


def test_a_running_mean_is_that_of_each_points_neighbours():
    points = [(float(i), float(i * i % 7)) for i in range(101)]
    expected = [fmean(y for _, y in points[max(0, i - 2) : i + 3]) for i in range(101)]  # 101 // 25 // 2
    assert [y for _, y in smoothed(points)] == pytest.approx(expected)


def test_what_was_zero_all_along_is_named_and_not_drawn(tmp_path: Path):
    panel = learning_panel(place_of_runs([write_run(tmp_path / "run", texts={})]))
    assert panel.zero == ["Missing rewards"]
    assert "Missing rewards" not in [chart.title for chart in panel.charts]


def test_faults_are_counted_by_kind_with_the_first_message(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={"a": "x"})
    rows = [{"step": 1, "kind": "timeout", "message": f"m{i}"} for i in range(3)]
    (folder / "faults.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = fault_lines(place_of_runs([folder]).runs)
    assert line.kinds == [("timeout", 3, "m0")]


def test_faults_of_evaluations_are_counted_apart_from_those_of_steps(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={})
    rows = [{"step": 4, "split": "id", "kind": "timeout", "message": "m"}] * 8
    (folder / "faults.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = (folder / "metrics.jsonl").read_text().replace('"reward/faults": 0.0', '"reward/faults": 1.0')
    (folder / "metrics.jsonl").write_text(metrics)
    (line,) = fault_lines(place_of_runs([folder]).runs)
    assert (line.rewards, line.evaluated) == (4, 8)  # one in each of four steps; eight rows of a split
    text = write_report([str(folder)]).read_text()
    assert "rewards failed in steps" in text


def test_an_alarm_is_no_fault_and_is_named(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={"a": "x"})
    rows = [{"step": 3, "kind": "timeout", "message": "m"}] + [
        {"step": step, "kind": "alarm", "alarm": "kl", "message": f"far, {step}"} for step in (5, 9)
    ]
    (folder / "faults.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = place_of_runs([folder])
    warnings = [s.text for s in sentences(place, "ppo") if s.kind == "warning"]
    assert any("1 faults were survived" in text for text in warnings)
    assert any("the alarm kl rang first at step 5: far, 5." in text for text in warnings)  # by evaluations alone
    steps = [{"step": step, "alarm/kl": float(step == 5), "time/step": 1.0} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    warnings = [s.text for s in sentences(place_of_runs([folder]), "ppo") if s.kind == "warning"]
    assert any("the alarm kl rang in 1 of 8 steps, first at step 5: far, 5." in text for text in warnings)
    table = summary_table(place)
    assert table.lines[0][table.columns.index("faults")] == "1"


def test_a_mix_is_shown_by_the_mean_of_its_tasks(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={})
    rows = [{"step": s, "eval/math/id/accuracy": 0.2 + s / 10, "eval/science/id/accuracy": 0.4} for s in (0, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert ends(run, "id") == pytest.approx((0.3, 0.5))
    assert ends(run, "ood") is None


# Texts


def test_the_samples_of_a_step_share_their_prompt(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={"a": "x"})
    (row,) = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    rows = [{**row, "sample": sample} for sample in range(4)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = page_data(place_of_runs([folder]).runs)
    assert len(data["prompts"]) == 1
    assert [(row["sample"], row["view"], row["text"]) for row in data["completions"]] == [
        (0, 0, "x"),
        (1, -1, "x"),
        (2, -1, "x"),
        (3, -1, "x"),
    ]


def test_a_response_whose_tokens_alone_were_logged_has_the_text_that_it_would_have_had(tmp_path: Path):
    settings = ["steps=1", "log.tokens=6", "log.completions=6", "sampling.max_completion_length=24"]
    Trainer(run_config(tmp_path / "run", *settings), task=Talk()).train()
    run = read_run(tmp_path / "run")
    texts = [row["text"] for row in page_data([replace(run, completions=[])])["completions"]]
    assert sorted(texts) == sorted(visible(row["completion"]) for row in run.completions)
    assert len(texts) == 6


def test_long_texts_are_shown_from_all_over_the_run_and_those_whose_tokens_do_not_fit_as_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_run(tmp_path / "run", texts={"a": "x"})
    (row,) = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    rows = [{**row, "step": step, "completion": "y" * 1000} for step in range(1, 101)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(report_texts, "TEXT_ROOM", 14_000)
    monkeypatch.setattr(report_texts, "TOKEN_ROOM", 10)
    data = page_data(place_of_runs([folder]).runs)
    steps = [one["step"] for one in data["completions"]]
    assert 1 in steps  # its tokens are on record, and have no room
    assert max(steps) > 80
    assert data["views"] == []


def test_numbers_that_are_none_stay_so(tmp_path: Path):
    folder = write_run(tmp_path / "run", texts={"a": "x"})
    text = (folder / "tokens.jsonl").read_text().replace('"observed": 0.0', '"observed": null')
    (folder / "tokens.jsonl").write_text(text)
    (row,) = page_data(place_of_runs([folder]).runs)["completions"]
    assert row["observed"] is None


# Studies


def study_rows(path: Path) -> Path:
    """Results of a study of two algorithms under two rates, two seeds each; ppo is 10 points better throughout."""
    rows = [
        {"task": "math", "noise": noise, "algorithm": name, "seed": seed, "id_before": 0.4, "ood_before": 0.3,
         "id_true": end + 0.02 * seed, "ood_true": None, "peak_true": end, "curve": [[0, 0.4, None], [4, end, None]],
         "corr": None, "seconds": 1.0, "machine": "m", "config_hash": "h", "commit": "c"}
        for noise, loss in (("clean", 0.0), ("flip", 0.2))
        for name, end in (("dvpo", 0.7 - loss), ("ppo", 0.8 - loss))
        for seed in (101, 102)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_unfinished_study_keeps_each_algorithms_colour(tmp_path: Path):
    study = load_study(ROOT / "configs" / "studies" / "tiny.yaml")
    algorithms = study.names("algorithm")
    rows = [row for row in read_results(study_rows(tmp_path / "rows.jsonl"))
            if (row["algorithm"], row["seed"]) != ("dvpo", 101)]  # fmt: skip
    for place in places_of_study(study, rows):
        assert [(one.name, one.colour) for one in place.series] == [
            (name, algorithms.index(name)) for name in ("dvpo", "ppo")
        ]
    alone = places_of_study(study, [row for row in rows if row["algorithm"] == "ppo"])[0]
    place = algorithms.index("ppo")
    assert place > 0
    assert [(one.name, one.colour) for one in alone.series] == [("ppo", place)]
    assert {line.colour for line in learning_panel(alone).charts[0].lines} == {place}


def test_a_row_of_another_study_is_not_drawn(tmp_path: Path):
    study = load_study(ROOT / "configs" / "studies" / "tiny.yaml")
    rows = read_results(study_rows(tmp_path / "rows.jsonl"))
    foreign = [{**row, "seed": 999, "id_true": 0.0, "id_before": 0.0} for row in rows]
    assert robustness_panels(study, [*rows, *foreign]) == robustness_panels(study, rows)


def test_a_study_is_shown_from_its_rows_alone(tmp_path: Path):
    rows = study_rows(tmp_path / "rows.jsonl")
    study = str(ROOT / "configs" / "studies" / "tiny.yaml")
    file = write_report([study], output=str(tmp_path / "study.html"), results=str(rows))
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert "noise" in page.ids
    assert "Over all 2 pairs of task and noise" in text
    assert "dvpo against ppo: it ends 10.0 points below it in distribution" in text
    assert page.data["completions"] == []


@pytest.mark.parametrize("task", [{"name": "files", "path": "prompts.jsonl"}, {}], ids=["no truth named", "none seen"])
def test_a_study_whose_reward_is_the_judge_says_so_all_over_its_page(tmp_path: Path, task: dict[str, str]):
    values = yaml.safe_load((ROOT / "configs" / "studies" / "tiny.yaml").read_text())
    values |= {"output": str(tmp_path), "algorithms": ["ppo"], "seeds": [1], "noises": {"clean": {}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**values, "tasks": {"math": task}}))
    study = load_study(tmp_path / "own.yaml")
    if not task:  # it knows no truth, as steps without a true reward show
        metrics = write_run(study.cells[0].folder, "ppo", {}, seed=1) / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("reward/true", "reward/another"))
    page = study_page(study, [a_row(task="math", algorithm="ppo", seed=1)], "ppo")
    charts = [page[name][0].charts[0].title for name in ("learning", "robustness")]
    texts = [page["places"][0]["sentences"][0].text, page["tables"][0].note, page["notes"][0], *charts]
    assert all("ccuracy by your reward (no truth was named)" in text for text in texts), texts


def test_the_noise_axis_is_the_rate_where_one_kind_is_varied_and_names_otherwise(tmp_path: Path):
    study = load_study(ROOT / "configs" / "studies" / "mini.yaml")
    assert noise_axis(study) == ([], [(0.0, "clean"), (0.2, "flip_20"), (0.4, "flip_40")])
    mixed = yaml.safe_load((ROOT / "configs" / "studies" / "mini.yaml").read_text())
    mixed["noises"]["spiky"] = {"kind": "spikes", "rate": 0.1, "sd": 3.0}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(mixed))
    names = ["clean", "flip_20", "flip_40", "spiky"]
    assert noise_axis(load_study(tmp_path / "mixed.yaml")) == (names, [*enumerate(names)])


def test_a_noise_that_is_another_for_another_task_has_each_tasks_own_rate_on_its_axis(tmp_path: Path):
    values = yaml.safe_load((ROOT / "configs" / "studies" / "mini.yaml").read_text())
    values |= {"tasks": {"math": {}, "science": {}}, "algorithms": ["ppo"], "seeds": [1]}
    flip = {"kind": "flip", "rate": 0.2, "tasks": {"science": {"kind": "flip", "rate": 0.4}}}
    values["noises"] = {"clean": {}, "flip": flip}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    study = load_study(tmp_path / "two.yaml")
    rows = [
        a_row(task=task, noise=noise, algorithm="ppo", seed=1, config_hash=cell.config_hash)
        for cell in study.cells
        for task, noise in [(cell.task, cell.noise)]
    ]
    axes = {panel.title: [x for x, _ in panel.charts[0].lines[0].points] for panel in robustness_panels(study, rows)}
    assert axes == {"math": [0.0, 0.2], "science": [0.0, 0.4]}


def test_a_study_without_rows_says_so(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="run the study first"):
        write_report([str(ROOT / "configs/studies/tiny.yaml")], results=str(tmp_path / "rows.jsonl"))


def test_the_committed_study_has_a_row_for_each_of_its_cells():
    study = load_study(ROOT / "configs" / "studies" / "mini.yaml")
    rows = read_results(ROOT / "benchmarks" / "results" / "mini_study.jsonl")
    assert {row_key(row) for row in rows} == {cell.key for cell in study.cells}
