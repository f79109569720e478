"""What stands in the site's side bar. A page that is named nowhere here fails the build."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference import GROUPS

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ALGORITHMS = Path(__file__).parents[1] / "algorithms"

NAVIGATION = {
    "Start": ["tutorial", "own_data", "choosing", "batch_sizes", "scale"],
    "What it does": ["method", "critic", "noise", "tasks", "labels"],
    "Using it": ["diagnose", "runs", "report", "studies", "evaluation", "metrics", "faults"],
    "Algorithms": sorted(f"algorithms/{page.stem}" for page in ALGORITHMS.glob("*.md")),
    "What was found": ["results", "protocol", "speed", "log"],
    "The project": ["architecture", "dependencies"],
    "Reference": [f"reference/{group}" for group in GROUPS],
}


def append_tables_of_contents(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Give the first page the tables that a code host has no use for."""
    if docname == "index":
        for caption, pages in NAVIGATION.items():
            entries = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n{entries}\n```\n"


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("source-read", append_tables_of_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
