"""The one exception that users are meant to see, and others told in its manner."""

import errno
import re
import traceback
from collections.abc import Iterator

NO_MEMORY = re.compile(
    "out of memory|can.?t (allocate memory|start new thread)|cannot allocate|bad_alloc|"
    "not enough memory|failed to map segment|resource temporarily unavailable",
    re.IGNORECASE,
)
"""How libraries say that the system gave no memory, or no thread for want of it."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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


def shortage(error: BaseException) -> str | None:
    """`memory` or `disk` where the machine's lack of it led to `error`, directly or not."""
    for one in _causes(error):
        number = one.errno if isinstance(one, OSError) else None
        if isinstance(one, MemoryError) or number == errno.ENOMEM:
            return "memory"
        if not isinstance(one, UserError) and NO_MEMORY.search(str(one)):
            return "memory"
        if number in NO_ROOM:
            return "disk"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
