"""The one exception that users are meant to see, and others told in its manner."""

import traceback


class UserError(ValueError):
    """A fault of the input, the configuration or the machine, not of the program.

    The message is one line: what was found, what was expected, and what to change. Stage scripts
    print it without a traceback and exit with status 1.
    """


def told(error: Exception) -> str:
    """What a user's own code raised, in one line with the line of code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno})"
