"""Is the plug-in loaded? `python -m dvpo.integrations.verl.check`: exit code 0 if it is, else 1 and the reason."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

MADE_FOR = "0.9"
UNDECLARED = ("uvicorn", "cachetools", "transfer_queue")
"""What verl imports and does not ask pip for."""


def faults() -> Iterator[str]:
    """What keeps the plug-in from working here, one sentence each, in the order in which to mend it."""
    if find_spec("verl") is None:
        yield "verl is not installed: pip install 'dvpo[verl]'"
        return
    if missing := [name for name in UNDECLARED if find_spec(name) is None]:
        yield f"verl needs {', '.join(missing)} and does not say so: pip install 'dvpo[verl]'"
        return
    if not [point for point in entry_points(group="verl.plugins") if point.name == "dvpo"]:
        yield "dvpo is not installed where Python looks for plug-ins: pip install it, PYTHONPATH alone is not enough"
        return
    allowed = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip()
    if allowed != "auto" and "dvpo" not in [name.strip() for name in allowed.split(",")]:
        yield f"VERL_USE_EXTERNAL_PLUGINS = {allowed} keeps it out: unset it, or name dvpo in it"
        return
    try:
        import verl  # noqa: F401
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    except Exception as error:
        yield f"verl itself cannot be imported: {type(error).__name__}: {error}"
        return
    if "dvpo" in TRAINER_REGISTRY:
        return
    try:
        import dvpo.integrations.verl.plugin  # noqa: F401
    except Exception as error:  # verl logs this at the level DEBUG, where nobody sees it
        yield f"the plug-in fails when it is imported: {type(error).__name__}: {error}"
    else:
        yield "the plug-in can be imported, but verl did not do so"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a folder on PYTHONPATH
        return "of an unknown version"


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m dvpo.integrations.verl.check", description=__doc__).parse_args(argv)
    found = list(faults())
    for fault in found:
        print(f"dvpo: {fault}", file=sys.stderr)  # noqa: T201
    if not found:
        print(f"dvpo {installed('dvpo')} is loaded in verl {installed('verl')}: trainer.v1.trainer_mode=dvpo")  # noqa: T201
    if find_spec("verl") is not None and not installed("verl").startswith(f"{MADE_FOR}."):
        print(f"dvpo: the plug-in is made for verl {MADE_FOR}, and nobody tried another", file=sys.stderr)  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
