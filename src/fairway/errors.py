"""The one exception that users are meant to see, and others told in its manner."""

import errno
import re
import traceback
from collections.abc import Iterator

NO_MEMORY = re.compile(
    "out of memory|can.?t (allocate memory|start new thread)|cannot allocate|bad_alloc|"
    "alloc_failed|not enough memory|failed to map segment|resource temporarily unavailable|"
    "without (setting an )?exception",
    re.IGNORECASE,
)
"""How libraries, and at last Python itself, say that there was no memory, or no thread."""
LONGEST_TEXT = 160
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class UserError(ValueError):
    """A fault of the input, the configuration or the machine, not of the program.

    The message is one line: what was found, what was expected, and what to change. Stage scripts
    print it without a traceback and exit with status 1.
    """


def told(error: BaseException) -> str:
    """What a user's own code raised, in one line with the line of code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno})"


def out_of_memory(error: BaseException) -> str | None:
    """What says that the machine's lack of memory led to `error`, directly or not."""
    for one in _causes(error):
        lacking = isinstance(one, MemoryError) or getattr(one, "errno", None) == errno.ENOMEM
        if lacking or (not isinstance(one, UserError) and NO_MEMORY.search(str(one))):
            return in_short(one)
    return None


def out_of_disk(error: BaseException) -> str | None:
    """What says that `error` is about a file that could not be written for want of room."""
    return in_short(error) if getattr(error, "errno", None) in NO_ROOM else None


def in_short(error: BaseException) -> str:
    """The error's type and the beginning of its text, on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
