"""Pages made of the code: the Python API from its docstrings, every setting, every command's help.

They are written into docs/reference/, which git ignores, before Sphinx looks for its pages.
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpo.cli import _parser
from dvpo.config import Config
from dvpo.explain import explain

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = Path(__file__).parents[1] / "reference"

MODULES = {
    "python": (
        "Trainer, configs, models",
        [
            "trainer",
            "config",
            "loading",
            "valuation",
            "critic",
            "policy",
            "checkpoint",
            "evaluate",
            "sampling",
            "batch",
            "errors",
        ],
    ),
    "core": (
        "Mathematics",
        [
            f"core.{name}"
            for name in ("quantiles", "returns", "risk", "tail_law", "categorical", "losses", "masks", "terms", "scan")
        ],
    ),
    "rows": ("Algorithms", ["algorithms", "estimates", "heads", "noise_rates", "risk_control", "kl"]),
    "tasks": (
        "Tasks",
        [
            "tasks",
            *(f"tasks.{name}" for name in ("named", "math", "science", "dialogue", "files", "gym", "mixture")),
        ],
    ),
    "rewards": (
        "Rewards and noise",
        ["rewards", "reward_mix", "reward_model", "math_answers", "noise", "noise_models", "preferences"],
    ),
    "stats": ("Statistics and studies", ["stats", "diagnosis", "study", "study_results", "study_table"]),
}
GROUPS = ["settings", "commands", *MODULES]


def write_pages(app: "Sphinx") -> None:
    FOLDER.mkdir(exist_ok=True)
    pages = {"settings": settings_page(), "commands": commands_page()}
    pages |= {group: modules_page(title, modules) for group, (title, modules) in MODULES.items()}
    for old in FOLDER.iterdir():
        old.unlink()
    for name, text in pages.items():
        (FOLDER / f"{name}.rst").write_text(text)


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n\n"


# Modules.


def modules_page(title: str, modules: list[str]) -> str:
    text = heading(title, "=")
    if "trainer" in modules:
        text += (
            "``from dvpo import Trainer, load_config, load_critic`` has the three names that most programs need.\n\n"
        )
    for name in modules:
        path = Path(inspect.getfile(import_module(f"dvpo.{name}")))
        source = path.relative_to(FOLDER.parents[1]).as_posix()
        text += heading(f"dvpo.{name}", "-")
        # `Algorithm.value` is a field whose default is a function: autodoc takes that for a method, beside the field.
        members = ":members:\n   :exclude-members: value"
        text += f".. automodule:: dvpo.{name}\n   {members}\n\n`{source} <source:{source}>`__\n\n"
    return text


def as_restructured(app: "Sphinx", what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: an indented block is an equation, bars and stars mean themselves."""
    made: list[str] = []
    block = section = False
    for line in lines:
        if line and not line.startswith(" "):
            block, section = False, bool(re.match(r"(Args|Returns|Raises|Yields):$", line))
        elif line and not section and not block and not "".join(made[-1:]):
            made += ["::", ""]
            block = True
        made.append(line if block else escaped(line))
    if what in ("attribute", "data", "property"):  # napoleon takes what stands before a colon for its type: none is
        made[0] = f": {made[0]}"
    lines[:] = made


def escaped(line: str) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else re.sub(r"[|\\*]|_(?!\w)", r"\\\g<0>", part) for part in parts)


# Settings.


def settings_page() -> str:
    text = heading("Settings", "=")
    text += (
        "Every key of a run's config with its default. An algorithm's row may have another one, and its page says so; "
        "``dvpo train my.yaml --print-config`` prints what a run would use.\n\n"
    )
    config = Config()
    sections = [
        field.name for field in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, field.name))
    ]
    loose = [field.name for field in dataclasses.fields(config) if field.name not in sections]
    text += heading("The run", "-") + "".join(entry(config, name, "") for name in loose)
    for name in sections:
        text += heading(name, "-") + "".join(entries(getattr(config, name), f"{name}."))
    return text


def entries(section: Any, prefix: str) -> Iterator[str]:
    yield " ".join((section.__doc__ or "").split()) + "\n\n"
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(inner := getattr(section, field.name)):
            yield from entries(inner, f"{prefix}{field.name}.")
        else:
            yield entry(section, field.name, prefix)


def entry(section: Any, name: str, prefix: str) -> str:
    said = explain(section, name, prefix)
    what = escaped(re.sub("`([^`]*)`", r"``\1``", said.meaning))
    kind = re.sub("`([^`]*)`", r"``\1``", said.kind)
    return f"``{said.name}``\n   {what} ({kind}; default ``{said.value}``)\n\n"


# Commands.


def commands_page() -> str:
    text = heading("Commands", "=") + literal(_parser())
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        text += heading(f"dvpo {name}", "-") + literal(parser)
    return text


def literal(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=88)  # type: ignore[assignment]
    return "::\n\n" + "".join(f"    {line}\n" for line in parser.format_help().splitlines()) + "\n"


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", as_restructured, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
