"""Which process may change a stage's folder: one at a time, and after a take-over the later one.

A process claims a folder with the lock file beside it, `.<name>.lock`, in which it leaves a token.
Before it puts a file in place or takes one away it looks whether its token still stands there. If
not, another process has taken over while this one was frozen, and this one stops.

Nothing slips in between looking and acting. A change is: make a temporary file, look, rename. A
take-over is: leave another token, delete every temporary file. So where the look came before the
take-over, there is nothing left to rename.
"""

import fcntl
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fairway.errors import UserError

TEMPORARY = ".partial"
"""How the names of temporary files and folders end; they begin with a dot."""

POLL_SECONDS = 0.1
MESSAGE_EVERY = 100
"""Looks at the lock between two messages about the wait."""


@dataclass(frozen=True)
class Claim:
    """One folder that this process may change. voucher: the file that goes first, if any."""

    folder: Path
    lock: Path
    token: bytes
    voucher: Path | None

    def stands(self) -> bool:
        """Whether no other process has taken over."""
        return _read(self.lock) == self.token


_held: list[Claim] = []


@contextmanager
def claimed(folder: str | Path, voucher: str | None = None) -> Iterator[None]:
    """Claim `folder`, and delete the temporary files that killed processes have left in it.

    voucher: name of a file in it that vouches for the others: it goes before one of them changes.
    While a running process has the claim, this one waits and says so; one that is stopped (SIGSTOP,
    Ctrl-Z) is taken over. Where the file system has no locks, whoever comes last takes over.
    Raises UserError where the folder cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    lock = _lock_of(folder)
    try:
        if folder.exists():
            tempfile.TemporaryFile(dir=folder).close()
        descriptor, token = _acquire(lock)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): expected a folder; make it writable "
            "or choose another `results` folder"
        ) from error
    claim = Claim(folder, lock, token, folder / voucher if voucher else None)
    _held.append(claim)
    try:
        _sweep(folder)
        yield
    finally:
        _held.remove(claim)
        if claim.stands():
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def claimant(folder: str | Path) -> tuple[str, str] | None:
    """Host and number of the process that has claimed `folder`, or was killed while it had."""
    host, process, *_ = [*_read(_lock_of(Path(folder))).decode(errors="replace").split(), "", ""]
    return (host, process) if process else None


def may_live(host: str, process: str) -> bool:
    """Whether a process runs; those of other hosts cannot be seen, and may."""
    return host != platform.node() or Path("/proc", process).exists()


def before_change(path: str | Path) -> None:
    """To be called right before a file or folder is renamed to or from `path`.

    Takes the voucher away where `path` is one of those that it vouches for. Raises UserError where
    a claim of this process was taken over.
    """
    check_claims()
    path = Path(os.path.abspath(path))
    for claim in _held:
        if claim.voucher and claim.voucher != path and claim.folder in path.parents:
            remove(claim.voucher)


def check_claims() -> None:
    """Raise UserError where a claim of this process was taken over."""
    for claim in _held:
        if not claim.stands():
            raise UserError(
                f"another process has taken over {claim.folder} while this one was frozen, or its "
                f"lock {claim.lock} was removed: this one stops and changes nothing more"
            )


def remove(path: str | Path) -> None:
    """Take a file or folder away, at once and as a whole; there may be none."""
    path = Path(path)
    if not os.path.lexists(path):
        return
    try:
        rest = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent))
        try:
            before_change(path)
            os.rename(path, rest / path.name)
        finally:
            delete(rest)
    except OSError as error:
        check_claims()
        raise UserError(
            f"{path} could not be removed ({error.strerror}): make its folder writable or choose "
            "another `results` folder"
        ) from error


def delete(path: Path) -> None:
    """Delete what is temporary, which may be gone already; the next claim deletes what is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sweep(folder: Path) -> None:
    for pattern in (f".*{TEMPORARY}", f"*/.*{TEMPORARY}"):
        for left in folder.glob(pattern):
            delete(left)
            if os.path.lexists(left):
                raise UserError(f"{left} could not be deleted: make its folder writable")


def _acquire(lock: Path) -> tuple[int, bytes]:
    """The locked file, which must stay open, and the token left in it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    token = f"{platform.node()} {os.getpid()} {uuid.uuid4().hex}".encode()
    waited = 0
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if _is_held(descriptor):
            os.close(descriptor)
            _take_over_or_wait(lock, waited)
            waited += 1
            continue
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, token, 0)
        if _read(lock) == token:
            return descriptor, token
        os.close(descriptor)  # whoever had it has just removed it


def _is_held(descriptor: int) -> bool:
    """Lock a file; whether a process has locked it already."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: the token alone decides
        return False
    return False


def _take_over_or_wait(lock: Path, waited: int) -> None:
    """Remove the lock of a process that is stopped, or wait for a while. waited: how often."""
    holder = _read(lock)
    host, process, *_ = [*holder.decode(errors="replace").split(), "?", "?"]
    if host == platform.node() and _is_stopped(process):
        _say(f"process {process} is stopped and is taken over from: it changes nothing more")
        if _read(lock) == holder:
            lock.unlink(missing_ok=True)
        return
    if waited % MESSAGE_EVERY == 0:
        _say(
            f"waiting for process {process} on {host}, which holds {lock} "
            f"({waited * POLL_SECONDS:.0f} s so far): let it finish, stop it with SIGTERM, or "
            "remove that file to take over from it"
        )
    time.sleep(POLL_SECONDS)


def _is_stopped(process: str) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _read(lock: Path) -> bytes:
    try:
        return lock.read_bytes()
    except FileNotFoundError:
        return b""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
