"""Arrows point down: cli -> trainer -> algorithms -> core; a reward function's process loads no torch."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dvpo"
MODULES = {
    ".".join(("dvpo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path, anywhere: bool = True) -> Iterator[str]:
    """The modules that a file imports, anywhere in it or at its top level: `from dvpo import x` counts as `dvpo.x`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


@cache
def ours(path: Path, anywhere: bool = True) -> frozenset[str]:
    return frozenset(name for name in imports(path, anywhere) if name in MODULES)


def loaded(name: str) -> set[str]:
    """Ours that importing a module loads too: what it imports at its top level, and what that imports in turn."""
    found, left = set[str](), [name]
    while left:
        new = ours(MODULES[left.pop()], anywhere=False) - found
        found |= new
        left += new
    return found


def within(name: str, home: str) -> bool:
    return name == home or name.startswith(f"{home}.")


@pytest.mark.parametrize(
    "module", ["dvpo", "dvpo.rewards", "dvpo.reward_worker", "dvpo.noise", "dvpo.config", "dvpo.cli"]
)
def test_what_needs_no_torch_loads_none(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_core_imports_torch_and_the_standard_library_and_nothing_of_ours_outside_core():
    compilers = {name: {"numba", "numpy"} for name in ("compiling", "compiled_loss", "compiled_ranks", "compiled_rows")}
    compilers["triton_huber"] = {"triton"}
    for name, path in MODULES.items():
        if name.startswith("dvpo.core"):
            for imported in imports(path):
                top = imported.split(".")[0]
                allowed = {"torch", *sys.stdlib_module_names, *compilers.get(name.removeprefix("dvpo.core."), ())}
                assert top in allowed or imported.startswith("dvpo.core"), name


def test_nothing_imports_the_command_line_but_the_module_that_is_run():
    assert {name for name, path in MODULES.items() if "dvpo.cli" in ours(path)} == {"dvpo.__main__"}


def test_arrows_point_down():
    below = {
        "dvpo.config": {"dvpo.algorithms", "dvpo.loading"},
        "dvpo.algorithms": {"dvpo.trainer", "dvpo.policy", "dvpo.critic", "dvpo.sampling", "dvpo.runlog", "dvpo.tasks"},
        "dvpo.policy": {"dvpo.trainer", "dvpo.critic", "dvpo.sampling", "dvpo.algorithms"},
        "dvpo.tasks": {"dvpo.trainer", "dvpo.sampling", "dvpo.algorithms", "dvpo.config"},
        "dvpo.trainer": {"dvpo.cli", "dvpo.demo", "dvpo.doctor", "dvpo.progress"},
    }
    for name, path in MODULES.items():
        reached = ours(path) | loaded(name)
        for home, above in below.items():
            if within(name, home):
                assert not [other for other in reached if any(within(other, one) for one in above)], name


def test_no_modules_import_each_other_in_a_circle():
    arrows = {name: ours(path) - {"dvpo"} for name, path in MODULES.items() if name != "dvpo"}
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names them


def test_the_three_names_of_the_package_are_there():
    code = "from dvpo import Trainer, load_config, load_critic; import dvpo; assert dvpo.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)
