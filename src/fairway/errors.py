"""The one exception that users are meant to see."""


class UserError(ValueError):
    """A fault of the input, the configuration or the machine, not of the program.

    The message is one line: what was found, what was expected, and what to change. Stage scripts
    print it without a traceback and exit with status 1.
    """
