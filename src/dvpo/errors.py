"""Two exceptions that end a run in one sentence: the user can mend this, and: the run stopped itself."""


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
