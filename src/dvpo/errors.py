"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """Bad input from outside: a config, a dataset, a folder, a reward function's signature.

    The message is one sentence that names the field, the value and the remedy. The command line prints it without
    a traceback and exits with code 2.
    """
