"""The report in a real browser: nothing leaves the page, nothing of a model runs, pointer and keyboard work."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from chromium import chromium
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

from dvpo.inspection import Question, inspect_checkpoint
from dvpo.plain_text import clipped, visible
from dvpo.report import write_report
from dvpo.report_panels import LONGEST_MESSAGE
from report_runs import HOSTILE, write_run
from runs import trained

ROOT = Path(__file__).parents[2]
PANELS = ("summary", "learning", "critic", "policy", "faults", "completions", "tokens", "about")
SIZES = {"desk": (1180, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_report([str(write_run(folder / name, name)) for name in ("dvpo", "ppo")])


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report, opened from the disk; at the end nothing may have gone wrong or out."""
    yield from opened(browser, report, "desk", "light")


def opened(browser: Browser, report: Path, size: str, scheme: str) -> Iterator[Page]:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", lambda request: None if request.url == report.as_uri() else troubles.append(request.url[:99]))
    page.goto(report.as_uri())
    yield page
    page.wait_for_timeout(50)
    assert troubles == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_panel_is_there_and_nothing_sticks_out(browser: Browser, report: Path, size: str, scheme: str) -> None:
    for page in opened(browser, report, size, scheme):
        assert [name for name in PANELS if not page.locator(f"#{name}").is_visible()] == []
        assert page.locator("#learning svg.chart").count() >= 3
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(18, 20, 23)") == (scheme == "dark")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages as the commands make them, of runs that were trained, and of the study that `make demo` reports."""
    folder = tmp_path_factory.mktemp("made")
    runs = [str(trained(folder / name, f"algorithm={name}").folder) for name in ("dvpo", "ppo")]
    study = [str(ROOT / "configs" / "studies" / "mini.yaml")]
    results = str(ROOT / "benchmarks" / "results" / "mini_study.jsonl")
    inspection = folder / "inspection.html"
    question = Question(prompt="2+3=", response="2+3=5;#5 <b>", reward=1.0)
    inspect_checkpoint(runs[0], question, "value", runs[1], str(inspection), Console(file=StringIO()))
    return {
        "runs": write_report(runs),
        "study": write_report(study, str(folder / "study.html"), results),
        "inspection": inspection,
    }


@pytest.mark.parametrize(
    ("name", "panels"), [("runs", PANELS), ("study", (*PANELS, "noise")), ("inspection", ["tokens"])]
)
def test_pages_of_the_commands_have_their_panels_and_react(
    browser: Browser, made: dict[str, Path], name: str, panels: tuple[str, ...]
) -> None:
    for page in opened(browser, made[name], "desk", "light"):
        assert [panel for panel in panels if not page.locator(f"#{panel}").is_visible()] == []
        if name == "study":  # its run folders are not committed: no response to look at
            assert page.locator("#noise svg.chart").count() >= 2
            continue
        tokens, detail = page.locator(".pane").first.locator(".tok"), page.locator(".pane").first.locator(".detail")
        tokens.nth(1).hover()
        assert "Token 2 of" in detail.inner_text()
        assert detail.locator("svg.law path.head").count() == 3
        assert detail.locator("svg.law path.lower").count() >= 1  # a tail in the histogram
        tokens.nth(1).focus()
        page.keyboard.press("Home")
        assert "Token 1 of" in detail.inner_text()


def test_each_hostile_fault_is_shown_as_text(page: Page) -> None:
    shown = page.locator("#faults").inner_text()
    squeezed = "".join(shown.split())
    missing = [
        name
        for name, text in HOSTILE.items()
        if "".join(clipped(visible(text), LONGEST_MESSAGE).split()) not in squeezed
    ]
    assert missing == []
    assert page.evaluate("window.attacked") is None


def test_each_hostile_completion_is_shown_as_text(page: Page) -> None:
    page.locator("#search").fill("")
    for name, text in HOSTILE.items():
        page.locator("#search").fill(f"prompt {name}:")
        page.locator("#rows .open").first.click()
        shown = page.locator(".pane").first.locator(".turn:not(:first-child) > div").all_inner_texts()
        assert "".join(shown).replace("·", "").strip() == f"{visible(text)}<|end|>".strip(), name
    assert page.evaluate("window.attacked") is None
    assert page.locator("#completions").is_visible()


def test_the_script_policy_stops_what_an_escape_would_let_through(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    # The wrong variant: a report that forgot to escape.
    leaky = tmp_path / "leaky.html"
    evil = (
        "<script>window.attacked = true</script><img src='http://example.com/x.png' onerror='window.attacked = true'>"
    )
    leaky.write_text(report.read_text().replace("<main>", f"<main>{evil}"))
    context = browser.new_context()
    page = context.new_page()
    sent: list[str] = []
    page.on("requestfinished", lambda request: sent.append(request.url))
    page.goto(leaky.as_uri())
    page.wait_for_timeout(50)
    assert page.evaluate("window.attacked") is None
    assert sent == [leaky.as_uri()]
    context.close()


def open_first_prompt(page: Page) -> None:
    page.locator("#of-run").select_option("0")
    page.locator("#search").fill("prompt emoji:")
    page.locator("#rows .open").first.click()


def test_a_token_reacts_to_the_pointer(page: Page) -> None:
    open_first_prompt(page)
    tokens, detail = page.locator(".pane").first.locator(".tok"), page.locator(".pane").first.locator(".detail")
    tokens.nth(0).hover()
    assert "Token 1 of 4" in detail.inner_text()
    assert "\u22121" in detail.inner_text()  # its advantage
    tokens.nth(2).hover()
    assert "Token 4 of 4" in detail.inner_text()
    assert detail.locator("svg.law .zone-lower").count() == 1
    assert detail.locator("svg.law .zone-upper").count() == 1
    assert detail.locator("svg.law path.head").count() == 2
    assert detail.locator("svg.law path.lower").count() >= 1  # the tails in the histogram
    assert detail.locator("svg.law path.upper").count() >= 1


def test_a_token_reacts_to_the_keyboard(page: Page) -> None:
    open_first_prompt(page)
    detail = page.locator(".pane").first.locator(".detail")
    page.locator(".pane").first.locator(".tok").nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert "Token 2 of 4" in detail.inner_text()
    page.keyboard.press("End")
    assert "Token 4 of 4" in detail.inner_text()
    page.keyboard.press("Home")
    assert "Token 1 of 4" in detail.inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"


def test_a_completion_opens_by_the_keyboard_alone(page: Page) -> None:
    page.locator("#search").fill("prompt script:")
    page.locator("#rows .open").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className").startswith("tok")
    assert (
        "prompt script"
        in page.locator(".pane").first.locator(".facts").inner_text() + page.locator(".pane .talk").first.inner_text()
    )


def test_tokens_take_the_colour_of_the_figure_that_is_asked_for(page: Page) -> None:
    open_first_prompt(page)
    grounds = []
    for figure in ("advantages", "value", "width"):
        page.locator(f"#colour input[value={figure}]").check()
        tokens = page.locator(".pane").first.locator(".tok")
        grounds.append(tokens.evaluate_all("all => all.map((t) => getComputedStyle(t).backgroundColor)"))
    assert "222, 104, 20" in grounds[0][0]  # a negative advantage is orange
    assert "37, 99, 205" in grounds[0][2]  # a positive one blue
    assert grounds[1][0] != grounds[1][2]
    assert grounds[1] != grounds[2]


def test_two_runs_stand_side_by_side_on_the_same_prompt(page: Page) -> None:
    open_first_prompt(page)
    panes = page.locator(".pane")
    assert panes.locator("h3").all_inner_texts() == ["dvpo, seed 0, step 4, sample 0", "ppo, seed 0, step 4, sample 0"]
    prompts = panes.locator(".turn:first-child > div").all_inner_texts()
    assert prompts[0] == prompts[1]
    panes.nth(0).locator(".tok").nth(1).hover()
    assert "Token 2 of 4" in panes.nth(1).locator(".detail").inner_text()  # the other follows
    assert "scalar critic" in panes.nth(1).locator(".detail").inner_text()
    page.locator("#beside").select_option("-1")
    assert panes.count() == 1


def test_the_turns_of_a_conversation_stand_apart(page: Page) -> None:
    open_first_prompt(page)
    roles = page.locator(".pane").first.locator(".turn > small").all_inner_texts()
    assert roles == ["prompt", "policy, turn 1", "environment", "policy, turn 2"]


def test_the_table_searches_filters_and_sorts(page: Page) -> None:
    def facts(label: str) -> list[str]:
        return page.locator(f"#rows td[data-label='{label}']").all_inner_texts()

    assert page.locator("#rows tbody tr").count() == 2 * len(HOSTILE)
    page.locator("#search").fill("prompt emoji:")
    assert page.locator("#rows tbody tr").count() == 2
    page.locator("#search").fill("")
    page.locator("#of-observed").select_option("1")
    assert set(facts("observed")) == {"1"}
    page.locator("#of-mismatch").select_option("differ")
    assert set(facts("true")) == {"0"}
    page.locator("#of-observed").select_option("")
    page.locator("#of-mismatch").select_option("")
    page.get_by_role("button", name="Step").click()
    steps = [int(text) for text in facts("step")]
    assert steps == sorted(steps)
    assert page.locator("#rows th[aria-sort=ascending]").inner_text().startswith("Step")


def test_a_chart_tells_its_values_to_pointer_and_keyboard(page: Page) -> None:
    chart, tip = page.locator("#learning svg.chart").first, page.locator("#tip")
    chart.hover()
    assert "step 2" in tip.inner_text()
    chart.focus()
    page.keyboard.press("End")
    assert "step 4" in tip.inner_text()
    assert "dvpo 80%" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
