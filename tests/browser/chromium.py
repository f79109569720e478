"""Which browser the tests take; `install` sees to it that there is one."""

import os
import shutil


def chromium() -> str | None:
    """The one that DVPO_CHROMIUM names, or one of the system; None: the one that playwright has installed."""
    names = (os.environ.get("DVPO_CHROMIUM", ""), "chromium-headless-shell", "chromium", "google-chrome")
    return next(filter(None, (shutil.which(name) for name in names)), None)
