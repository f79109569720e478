"""The prose says what the code does: links, commands, settings, files, metrics, dependencies; and its examples run."""

import ast
import json
import re
import shlex
import sys
import textwrap
import tomllib
from contextlib import nullcontext
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dvpo import Trainer, load_config
from dvpo.algorithms import ALGORITHMS
from dvpo.cli import main, parse
from dvpo.config import OF_FILES, to_yaml
from dvpo.embedded import make_model, make_tokenizer
from dvpo.study import load_study
from dvpo.tasks.math import ChainArithmetic
from dvpo.tasks.mixture import Mixture
from dvpo.tasks.science import Science
from fake_vllm import FakeVllm

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
sys.path.append(str(DOCS / "site"))
navigation, reference = import_module("navigation"), import_module("reference_pages")
EXAMPLES = DOCS / "own_data.md"
TINY = (
    "steps=1",
    "sampling.prompts_per_step=2",
    "sampling.samples_per_prompt=2",
    "sampling.max_completion_length=16",
    "evaluation.prompts=2",
)

ASKED_FOR = (
    "actor.kl.coef=0.01",
    "actor.kl.target=0.1",
    "evaluation.samples=2",
    "sampling.correction.kind=truncated",
    "reward.mix=[{function: task}]",
    "reward.overlong=8",
)
"""What is logged on request only."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def lines(page: Path) -> list[str]:
    """Lines of code, comments and what a command printed (```text) left out."""
    prose = re.sub(r"^```text\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```\w*\n(.*?)^```", prose, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.MULTILINE | re.DOTALL)
    shown = [*re.findall(r"^ {4}(.*)", prose, re.MULTILINE), *"\n".join(blocks).splitlines()]
    return [re.split(r"(?:^|\s)#", line)[0].strip() for line in shown]


def mentions(page: Path) -> list[str]:
    """Code within a sentence."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```|^ {4}.*?$", "", page.read_text(), flags=re.M | re.S))


def code(page: Path) -> list[str]:
    return [*lines(page), *mentions(page)]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|^ {4}.*?$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not link.startswith("http") and (not target.exists() or (anchor and anchor not in anchors(target))):
            dead.append(link)
    assert dead == []


# Commands and settings.


@pytest.fixture(scope="module")
def settings() -> set[str]:
    """Every config key and every section, dotted."""
    found: set[str] = set()

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            found.add(prefix + key)
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(yaml.safe_load(to_yaml(load_config())), "")
    return found


def commands(shown: list[str]) -> list[list[str]]:
    """The words of command lines, without what a synopsis has in brackets and its dots."""
    found = [re.match(r"(?:\S*/)?dvpo ([a-z].*)", re.sub(r" \[.*\]| \.\.\.", "", line)) for line in shown]
    return [shlex.split(match[1]) for match in found if match]


def their_config(overrides: list[str]) -> dict[str, Any] | None:
    """The user's own file, of which an override of `task.answer_pattern`, say, speaks."""
    of_files = any(word.split("=")[0].removeprefix("task.") in OF_FILES for word in overrides)
    return {"task": {"name": "files", "path": "mine.jsonl"}} if of_files else None


@each_page
def test_every_command_line_is_one_and_its_overrides_are_settings(page: Path) -> None:
    for words in commands(lines(page)):
        arguments = parse(words)
        overrides = [*getattr(arguments, "overrides", ()), *getattr(arguments, "set", ())]
        # `key.sub=value` is the form itself, and rows of one's own are imported by another test.
        known = [word for word in overrides if word != "key.sub=value" and not re.search(r"\w:\w", word)]
        load_config(their_config(known), known)


@each_page
def test_every_command_mentioned_has_its_options_and_overrides(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, *words in commands(mentions(page)):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command
        options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert {word for word in words if word.startswith("--")} <= options
        overrides = [word for word in words if re.match(r"[a-z._]+=", word) and word != "key.sub=value"]
        load_config(their_config(overrides), overrides)


@each_page
def test_every_make_target_shown_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = {match[1] for line in code(page) if (match := re.match(r"make ([a-z-]+)", line))}
    assert shown <= set(targets)


@each_page
def test_every_setting_named_in_prose_exists(page: Path, settings: set[str]) -> None:
    sections = {name.split(".")[0] for name in settings if "." in name}
    named = [re.match(r"[a-z_]+(?:\.[a-z_]+)+", line) for line in code(page)]
    keys = {match[0] for match in named if match and match[0].split(".")[0] in sections and match[0][-3:] != ".py"}
    assert keys - settings == set()


def test_the_table_of_algorithms_names_every_row_once() -> None:
    table = [line for line in (DOCS / "algorithms.md").read_text().splitlines() if line.startswith("| [`")]
    named = [name for line in table for name in re.findall(r"\[`(\w+)`\]\(algorithms/\1\.md\)", line.split(" | ")[0])]
    assert sorted(named) == sorted(ALGORITHMS)


def test_the_defaults_on_an_algorithms_page_are_those_of_its_row() -> None:
    value = r"`?(true|false|[\d.]*\d(?:e-\d)?|[a-z]\w*)`?"
    checked = 0
    for name in ALGORITHMS:
        page = (DOCS / f"algorithms/{name}.md").read_text()
        section = page.split("\n## Defaults", 1)[1].split("\n## ", 1)[0]
        stated = re.findall(rf"`([a-z_]+\.[a-z_.]+)`\s{value}(?=[,.;:]| \()", section)  # `setting` value,
        for settings, values in re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE):  # | `one`, `two` | 1, 2 |
            stated += zip(re.findall(r"`([a-z_.]+)`", settings), re.findall(rf"(?:^|, ){value}", values), strict=False)
        config = load_config(None, [f"algorithm={name}"])
        for setting, word in stated:
            actual = attrgetter(setting)(config)
            said = yaml.safe_load(word) if word in ("true", "false") else word if word.isidentifier() else float(word)
            if isinstance(said, str) and not isinstance(actual, str):
                continue  # a verb, as in "whatever `critic.num_heads` says,"
            assert actual == said, f"{name}: {setting}"
            checked += 1
    assert checked > 40


@each_page
def test_every_yaml_block_is_a_valid_config_or_study(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "my_rows", SimpleNamespace(mine=ALGORITHMS["dvpo"]))  # type: ignore[arg-type]
    for block in fenced(page, "yaml"):
        values = yaml.safe_load(block)
        if "seeds" in values or "like" in values:
            (tmp_path / "noise.yaml").write_text((ROOT / "configs" / "studies" / "noise.yaml").read_text())
            (tmp_path / "study.yaml").write_text(block)
            assert load_study(tmp_path / "study.yaml").cells
        else:
            load_config(values)


@each_page
def test_every_block_of_python_compiles_and_imports_what_is_there(page: Path) -> None:
    indented = re.findall(r"(?:^ {4}.*\n)+", page.read_text(), re.MULTILINE)
    blocks = [textwrap.dedent(block) for block in indented]
    for block in [*fenced(page, "python"), *(block for block in blocks if re.match(r"(import|from) \w", block))]:
        tree = ast.parse(block)
        for imported in (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)):
            exec(compile(ast.Module([imported], []), str(page), "exec"), {})


def test_the_reference_says_of_every_setting_what_it_is(settings: set[str]) -> None:
    explained = dict(re.findall(r"^``([a-z_.]+)``\n   (.*)$", reference.settings_page(), re.MULTILINE))
    sections = {name.rpartition(".")[0] for name in settings}
    assert set(explained) == settings - sections
    assert [key for key, text in explained.items() if text.lstrip().startswith("(")] == []


def test_the_sites_side_bar_names_every_page_once_and_no_other() -> None:
    named = [page for pages in navigation.navigation().values() for page in pages]
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    made = {f"reference/{group}" for group in reference.GROUPS}
    assert set(named) == pages - {"index"} | made
    assert len(named) == len(set(named))


# Files, dependencies, versions.


def test_the_architecture_names_every_file_of_the_package() -> None:
    prose = (DOCS / "architecture.md").read_text()
    package = ROOT / "src" / "dvpo"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")} | {"py.typed", "assets/"}
    named = set(re.findall(r"^\| `([^`]+)` \|", prose, re.MULTILINE))
    assert named == files


def test_every_dependency_has_its_reason_and_no_reason_lacks_its_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        "Needed": {(name_of(line),) for line in project["dependencies"]},
        "Extras": {(f"`{extra}`", name_of(line)) for extra in extras.keys() - {"dev"} for line in extras[extra]},
        "Development": {(name_of(line),) for line in extras["dev"]},
    }
    prose = (DOCS / "dependencies.md").read_text()
    for heading, names in wanted.items():
        part = prose.split(f"## {heading}\n")[1].split("\n## ")[0]
        rows = [row.strip("|").split("|") for row in part.splitlines() if row.startswith("|")][2:]
        columns = len(next(iter(names)))
        assert {tuple(cell.strip() for cell in row[:columns]) for row in rows} == names
        assert all(cell.strip() for row in rows for cell in row)


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0]


def test_the_version_is_one_in_project_citation_and_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_quotes_the_committed_benchmark() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "quantile_loss.json").read_text())
    quoted = re.search(
        r"(\d+) times faster .*?with ([\d.]+)% of its memory", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert quoted
    figures = (f"{result['speedup']['cpu']['median']:.0f}", f"{100 * result['peak_rise_share']:.1f}")
    assert quoted.groups() == figures


# What is shown runs, and what it logs is explained.


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_glossary_explains_every_key_that_a_run_logs_and_no_other(tmp_path: Path, tiny_model: Path) -> None:
    logged = set()
    mix = Mixture([ChainArithmetic(8, 2, 2), Science(8, 2, 2)], [1, 1])
    followed = ["critic.adaptive_risk=true", "reward.trusted=0.5"]
    for name in ("dvpo_paper", "ppo_corrected", "cql_ppo", "ppo_hl_gauss"):
        asked_for = [*ASKED_FOR, *(followed if name == "dvpo_paper" else ())]
        place = [f"algorithm={name}", f"model.path={tiny_model}", f"output={tmp_path / name}"]
        with FakeVllm(tiny_model) if name == "ppo_corrected" else nullcontext() as server:
            if server is not None:
                place += ["sampling.engine=vllm", f"sampling.vllm.address={server.address}"]
            config = load_config(None, [*TINY, *place, *asked_for, "steps=2", "critic.replay=1"])
            Trainer(config, task=mix if name == "cql_ppo" else None).train()
        logged |= {key for row in rows_of(tmp_path / name) for key in row}
    logged = {re.sub(r"^eval/(\w+/)+", "eval/<split>/", key).replace("@2", "@k").replace("^2", "^k") for key in logged}
    logged = {re.sub(r"^reward/true/\w+", "reward/true/<task>", key) for key in logged}
    logged = {key.replace("reward/part/task", "reward/part/<name>") for key in logged}
    table = re.findall(r"^\| (`.*?`) \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    assert {key for cell in table for key in re.findall(r"`([^`]+)`", cell)} == logged


def test_the_own_data_page_runs_as_it_stands(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in fenced(EXAMPLES, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, "a block of Python begins with its file's name"
        Path(name[1]).write_text(block)
        module = Path(name[1]).stem
        monkeypatch.setitem(sys.modules, module, None)  # noted, so that what is imported now is forgotten afterwards
        del sys.modules[module]
    Path("my_prompts.jsonl").write_text(fenced(EXAMPLES, "json")[0])
    Path("my.yaml").write_text(fenced(EXAMPLES, "yaml")[0])
    (study,) = [block for block in fenced(EXAMPLES, "yaml") if block.startswith("# my_study.yaml")]
    Path("my_study.yaml").write_text(study)
    assert len(load_study("my_study.yaml").cells) == 15
    own_reward = load_config("my.yaml", TINY)  # from the embedded model, as the page says
    own_task = ["task.name=my_task:make_task", "reward.function=task", "algorithm=my_rows:rank", "output=runs/rank"]
    own_rest = load_config("my.yaml", [*TINY, f"model.path={tiny_model}", *own_task])
    for config in (own_reward, own_rest):
        Trainer(config).train()
        (step,) = [row for row in rows_of(Path(config.output)) if "reward/observed" in row]
        assert (step["reward/faults"], step["reward/missing"]) == (0, 0)
    assert 0 < step["actor/advantage_std"] <= 0.5  # a rank advantage lies in [-1/2, 1/2]


def test_a_checkpoints_policy_opens_as_the_evaluation_page_says(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer(load_config(None, [*TINY, f"model.path={tiny_model}", "output=runs/first"])).train()
    (block,) = fenced(DOCS / "evaluation.md", "python")
    capsys.readouterr()
    exec(block.replace("checkpoint-40", "checkpoint-1"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_blocks_of_the_critics_page_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in fenced(DOCS / "critic_use.md", "python"):
        exec(block, names)
    said = capsys.readouterr().out.splitlines()
    assert 0 <= float(said[0]) <= 1
    first, other = names["readings"]
    assert first.values_U[:15].tolist() == pytest.approx(other.values_U[:15].tolist(), abs=1e-5)  # up to `...-4=1`
    assert first.value != other.value
    assert json.loads(said[-1]) == pytest.approx([first.value], abs=1e-5)


def test_the_readme_shows_what_the_own_data_page_runs() -> None:
    for language in ("python", "json", "yaml"):
        assert set(fenced(ROOT / "README.md", language)) <= set(fenced(EXAMPLES, language))
