"""`dvpo report`: runs or a study as one HTML page that needs nothing else, neither a network nor a server.

The page is rendered here (charts are SVG); one small inlined script adds the table, the token view and the values
under the pointer. A content security policy names that script by its hash: nothing else on the page can run, and no
request can leave it, whatever the texts in it contain.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dvpo import __version__
from dvpo.durable import output_file, write_atomically
from dvpo.errors import InputError
from dvpo.report_data import Place, Run, place_of_runs, places_of_study
from dvpo.report_panels import POLICY, critic_panel, fault_lines, learning_panel, panel
from dvpo.report_study import robustness_panels
from dvpo.report_summary import summary_table
from dvpo.report_texts import page_data, script_json
from dvpo.report_words import knows_truth, overall, sentences
from dvpo.study import Study, load_study
from dvpo.study_results import Row, read_results
from dvpo.study_table import find_baseline, make_report

NAME = "report.html"
SCRIPTS = ("page.js", "charts.js", "law.js", "tokens.js", "completions.js", "start.js")


def write_report(
    sources: Sequence[str], output: str | None = None, results: str | None = None, baseline: str | None = None
) -> Path:
    """Write the report of some runs or of a study, and return its path, from the working directory if it lies in there.

    Args:
        sources: run folders, folders of runs, or the YAML file of one study.
        output: the file; None: `report.html` in the run's folder, in the folder that holds the runs, or in the study's.
        results: the results file of a study, if it is not in the study's output.
        baseline: whom the others are compared with; None: `ppo`, or the first where it is not there.

    Raises:
        InputError: no run, no results, a damaged log, a baseline that is not there, a file that cannot be written.
    """
    if any(Path(source).suffix in (".yaml", ".yml") for source in sources):
        if len(sources) > 1:
            raise InputError("dvpo report takes one study, or run folders: name a single YAML file")
        study = load_study(sources[0])
        rows = read_results(Path(results) if results else study.results)
        page, home = study_page(study, rows, baseline), study.output
        title = f"Study {Path(sources[0]).stem}"
    else:
        if results:
            raise InputError(f"--results = {results} belongs to a study: name its YAML file instead of run folders")
        folders = run_folders(sources)
        place, home = place_of_runs(folders), common_folder(folders)
        page = _page([place], find_baseline(baseline, [series.name for series in place.series], "runs"))
        title = f"Run {home.absolute().name}" if len(folders) == 1 else f"{len(folders)} runs of {home.name}"
    file = write_page(Path(output) if output else home / NAME, "report.html", {"title": title, **page}).absolute()
    here = Path.cwd()
    return file.relative_to(here) if file.is_relative_to(here) else file


def run_folders(sources: Sequence[str]) -> list[Path]:
    """The run folders that are named, or that lie in a folder that is named.

    Raises:
        InputError: a folder that is no run and holds none.
    """
    folders: list[Path] = []
    for source in map(Path, sources):
        inside = [source] if (source / "manifest.json").exists() else []
        inside = inside or sorted(path.parent for path in source.glob("*/manifest.json"))
        if not inside:
            raise InputError(f"{source} holds no run: give run folders, a folder of runs, or a study's YAML file")
        folders += inside
    return folders


def common_folder(folders: Sequence[Path]) -> Path:
    """The run's own folder, or the innermost one that holds all of them."""
    if len(folders) == 1:
        return folders[0]
    parents = [path.absolute().parents for path in folders]
    shared = [parent for parent in parents[0] if all(parent in others for others in parents)]
    return shared[0]


def study_page(study: Study, rows: Sequence[Row], baseline: str | None) -> dict[str, Any]:
    """What the template needs for a study."""
    algorithms = study.names("algorithm")
    baseline = find_baseline(baseline, algorithms)
    places = places_of_study(study, rows)
    blind = {place.task for place in places if not knows_truth(place.runs)}
    tables = make_report(study, rows, baseline, blind=blind)
    return _page(places, baseline) | {
        "robustness": robustness_panels(study, rows, blind),
        "sheets": tables.sheets,
        "notes": tables.notes,
        "series": algorithms,
    }


def _page(places: Sequence[Place], baseline: str) -> dict[str, Any]:
    """What the template needs for the runs of some places side by side."""
    runs = [run for place in places for run in place.runs]
    data = page_data(runs)
    return {
        "overall": overall(places, baseline) if len(places) > 1 else [],
        "places": [{"title": place.title, "sentences": sentences(place, baseline)} for place in places],
        "tables": [summary_table(place) for place in places],
        "series": [series.name for series in places[0].series],
        "learning": [learning_panel(place) for place in places],
        "critic": _with_charts([critic_panel(place) for place in places]),
        "policy": _with_charts([panel(place, POLICY) for place in places]),
        "faults": fault_lines(runs),
        "robustness": [],
        "sheets": [],
        "notes": [],
        "about": [about(run) for run in runs],
        "data": Markup(script_json(data)),
        "has_texts": bool(data["completions"]),
        "left_out": data["left_out"],
    }


def _with_charts(panels: Sequence[Any]) -> list[Any]:
    return [panel for panel in panels if panel.charts]


def about(run: Run) -> dict[str, Any]:
    """Where a run comes from: of a resumed one all that it was made by."""
    sessions = [run.manifest, *run.manifest.get("resumes", [])]

    def joined(of: Callable[[Mapping[str, Any]], str]) -> str:
        return "; then ".join(dict.fromkeys(filter(None, map(of, sessions))))

    return {
        "run": run.label,
        "commit": joined(_commit),
        "config": joined(lambda session: str(session.get("config_hash", ""))),
        "machine": joined(lambda session: str(_hardware(session.get("machine", {})))),
        "started": joined(lambda session: str(session.get("started", ""))),
        "versions": joined(_versions),
    }


def _commit(session: Mapping[str, Any]) -> str:
    commit = str(session.get("commit") or "no git checkout")
    return f"{commit}{', with uncommitted changes' if session.get('dirty') else ''}"


def _hardware(machine: Mapping[str, Any]) -> str:
    return machine.get("gpu") or machine.get("cpu") or ""


def _versions(session: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in session.get("versions", {}).items() if v)


# Rendering


def write_page(path: Path, template: str, content: dict[str, Any]) -> Path:
    """Render a template of `templates/` into a file.

    Raises:
        InputError: the file has another ending than .html, or its folder does not exist.
    """
    if path.suffix != ".html":
        raise InputError(f"{path} is no name for a page: let it end in .html")
    write_atomically(output_file(path), [render(template, content).encode()])
    return path


def render(template: str, content: dict[str, Any]) -> str:
    """A whole page as text; everything in `content` is escaped but what is Markup already."""
    style = _asset("page.css")
    script = "\n".join(["(() => {", '"use strict";', *map(_asset, SCRIPTS), "})();"])
    return _environment().get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
        version=__version__,
        **content,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    loader = PackageLoader("dvpo", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
