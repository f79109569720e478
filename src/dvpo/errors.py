"""What is said to the user in one sentence: the user can mend this; the run stopped itself; and warnings."""

import os
import warnings

PLACED_WARNING = warnings.formatwarning


class InputError(ValueError):
    """Bad input from outside: a config, a dataset, a folder, a reward function's signature.

    The message is one sentence that names the field, the value and the remedy. The command line prints it without
    a traceback and exits with code 2.
    """


class RunStoppedError(Exception):
    """A run ended itself: a bound that the config sets was passed, or an alarm rang that it says to stop at.

    The message is one sentence that says what was seen, where it is on record and how to go on. The command line prints
    it without a traceback and exits with code 3.
    """


def warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """For `warnings.formatwarning`: our own are sentences to the user, to whom where they were raised is no news."""
    if category is UserWarning and filename.startswith(os.path.join(os.path.dirname(__file__), "")):
        return f"dvpo: warning: {message}\n"
    return PLACED_WARNING(message, category, filename, lineno, line)
