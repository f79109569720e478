"""The site: `make docs` builds it into site/. The pages are plain Markdown, readable on a code host as they stand."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

project = "dvpo"
author = "The dvpo developers"
copyright = "the dvpo developers"
version = release = version_of("dvpo")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "navigation",
    "reference_pages",
    "sources",
]
root_doc = "index"
exclude_patterns = ["site", "conf.py"]

# Links are those that a code host understands, headings have its anchors; a dead one is a warning, and so an error.
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "source": None}

# Indented blocks are commands, equations and pictures of the tree; what is code says so.
highlight_language = "none"

# What a docstring puts in backticks is a name: a link where the name has a page, code where not.
default_role = "py:obj"
suppress_warnings = [
    "ref.python",  # a word such as `seed` names fields of several classes
    "myst.header",  # tables that a command writes bring their own headings
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"dvpo {version}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # summaries are fetched, which no page from a disk may do
html_show_sphinx = False
html_show_copyright = False
