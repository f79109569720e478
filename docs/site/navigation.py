"""What stands in the site's side bar, in this order; a page that is named nowhere comes under "Further pages"."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference_pages import GROUPS

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]

CHOSEN = {
    "Start": ["tutorial", "own_data", "choosing", "batch_sizes", "scale", "verl"],
    "What it does": ["method", "critic", "noise", "tasks", "labels"],
    "Using it": ["diagnose", "runs", "report", "studies", "evaluation", "critic_use", "metrics", "faults"],
    "Algorithms": ["algorithms", *sorted(f"algorithms/{page.stem}" for page in DOCS.glob("algorithms/*.md"))],
    "What was found": ["results", "protocol", "paper", "speed", "log"],
    "The project": ["architecture", "dependencies"],
    "Reference": [f"reference/{group}" for group in GROUPS],
}


def navigation() -> dict[str, list[str]]:
    named = {page for pages in CHOSEN.values() for page in pages}
    pages = sorted(page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md"))
    further = [page for page in pages if page not in named and page != "index"]
    return CHOSEN | ({"Further pages": further} if further else {})


def append_tables_of_contents(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Give the first page the tables that a code host has no use for."""
    if docname == "index":
        for caption, pages in navigation().items():
            entries = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n{entries}\n```\n"


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("source-read", append_tables_of_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
