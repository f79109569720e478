"""The built site, by `make docs`: whole, without a network, and nothing private in it."""

import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site"
ASSETS = {"img": "src", "script": "src", "source": "src", "iframe": "src", "link": "href"}


class Page(HTMLParser):
    """What a page loads, where it leads, and which places it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.assets: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if ASSETS.get(tag, "") in values and values.get("rel", "") not in (
            "index",
            "search",
            "next",
            "prev",
            "canonical",
        ):
            self.assets.append(values[ASSETS[tag]])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    assert (SITE / "index.html").exists(), "there is no site: `make docs` builds it"
    return {path: Page(path) for path in SITE.rglob("*.html")}


def test_every_page_of_the_docs_is_there_and_can_be_searched(pages: dict[Path, Page]) -> None:
    docs = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert {SITE / page.with_suffix(".html") for page in docs} <= pages.keys()
    index = (SITE / "searchindex.js").read_text()
    assert all(f'"{page.with_suffix("").as_posix()}"' in index for page in docs)


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    remote = {
        asset for page in pages.values() for asset in page.assets if urlsplit(asset).scheme or asset.startswith("/")
    }
    assert {asset for asset in remote if not asset.startswith("data:")} == set()
    missing = [
        (page.path, asset) for page in pages.values() for asset in page.assets if not led_to(page, asset)[0].exists()
    ]
    assert missing == []
    for sheet in SITE.rglob("*.css"):
        loaded = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")]+)", sheet.read_text())
        assert [address for address in loaded if re.match(r"https?:|//", address)] == [], sheet


def test_every_link_within_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    dead = defaultdict(set)
    for page in pages.values():
        for link in page.links:
            if urlsplit(link).scheme:
                continue
            target, place = led_to(page, link)
            if target not in pages or (place and place not in pages[target].places):
                dead[page.path.relative_to(SITE)].add(link)
    assert dead == {}


def led_to(page: Page, link: str) -> tuple[Path, str]:
    parts = urlsplit(link)
    target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    return target, unquote(parts.fragment)


def test_the_reference_has_the_public_names_and_no_private_ones(pages: dict[Path, Page]) -> None:
    reference = {place for path, page in pages.items() if path.parent.name == "reference" for place in page.places}
    for name in ("trainer.Trainer", "loading.load_config", "valuation.load_critic", "core.returns.gae", "stats.iqm"):
        assert f"dvpo.{name}" in reference
    assert [place for place in reference if re.match(r"dvpo\.(.*\.)?_", place)] == []


def test_docstrings_keep_their_equations_and_colons(pages: dict[Path, Page]) -> None:
    text = re.sub(r"<[^>]+>", "", (SITE / "reference" / "core.html").read_text())
    assert "Not tried again: a function" in (SITE / "reference" / "rewards.html").read_text()
    assert "delta_tj = r_t + gamma theta_j(s_{t+1}) - theta_j(s_t)" in text
    assert re.search(r"\n *gain +\( mean up\(theta\) - mean up\(G\) \)\^2", text)
