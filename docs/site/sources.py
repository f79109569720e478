"""Links out of docs/ lead to pages of the site that show the file, so that the site is whole without a code host."""

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
SCHEME = "source:"
LARGEST = 200_000
"""Bytes of a file that a folder's page still names."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{path}</title>
<link rel="stylesheet" href="{up}_static/pygments.css">
<link rel="stylesheet" href="{up}_static/source.css">
<body class="source">
<p><a href="{up}index.html">dvpo</a> / <code>{path}</code></p>
{body}
"""

logger = logging.getLogger(__name__)


def name_sources(app: Sphinx, docname: str, text: list[str]) -> None:
    """`](../src/x.py)` becomes `](source:src/x.py)`, whatever the depth of the page."""
    folder = (DOCS / docname).parent

    def renamed(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if target.is_relative_to(DOCS) or not target.is_relative_to(ROOT):
            return link[0]
        return f"]({SCHEME}{target.relative_to(ROOT).as_posix()})"

    text[0] = re.sub(r"\]\((\.\./[^)\s#]+)\)", renamed, text[0])


def lead_to_pages(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Turn `source:` into relative addresses, and note which files are asked for."""
    for link in doctree.findall(nodes.reference):
        if not link.get("refuri", "").startswith(SCHEME):
            continue
        path = link["refuri"].removeprefix(SCHEME)
        if not (ROOT / path).exists():
            logger.warning("a link leads to %s, which is not there", path, location=link)
            continue
        app.env.asked_for.add(path)  # type: ignore[attr-defined]
        link["refuri"] = "../" * docname.count("/") + address(path)


def address(path: str) -> str:
    return f"source/{path}.html"


def write_pages(app: Sphinx, failure: Exception | None) -> None:
    """A page for each file that is linked to, and for each folder with all that is in it."""
    waiting, done = sorted(app.env.asked_for), set()  # type: ignore[attr-defined]
    while waiting and not failure:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        target = ROOT / path
        up = "../" * address(path).count("/")
        if target.is_dir():
            inside = sorted(entry for entry in target.iterdir() if shown(entry))
            waiting += [f"{path}/{entry.name}" for entry in inside]
            body = "<ul>"
            for entry in inside:
                there = up + address(f"{path}/{entry.name}")
                body += f'<li><a href="{there}"><code>{entry.name}{"/" * entry.is_dir()}</code></a></li>'
            body += "</ul>"
        else:
            highlighter = app.builder.highlighter  # type: ignore[attr-defined]
            body = highlighter.highlight_block(target.read_text(), language_of(target), force=True, location=path)
        page = Path(app.outdir, address(path))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE.format(path=html.escape(path), up=up, body=body))


def shown(entry: Path) -> bool:
    """Text of a size that a page can hold; neither hidden nor made by a tool."""
    if entry.name.startswith((".", "__pycache__")):
        return False
    if entry.is_dir():
        return any(map(shown, entry.iterdir()))
    return entry.stat().st_size <= LARGEST and b"\0" not in entry.read_bytes()[:4096]


def language_of(path: Path) -> str:
    try:
        return str(get_lexer_for_filename(path.name).aliases[0])
    except ClassNotFound:
        return "none"


def begin(app: Sphinx) -> None:
    app.env.asked_for = set()  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", begin)
    app.connect("source-read", name_sources)
    app.connect("doctree-resolved", lead_to_pages)
    app.connect("build-finished", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
