"""File locks between processes that share a folder; the operating system frees those of a killed process."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
"""Errors of `flock` on a lock that somebody has; EACCES, which some network drives give, can also mean that
there are no locks."""


def lock_of(folder: Path, file: Path) -> Path:
    """Path of the lock in `folder` for a file named `<hash>` or `<word>-<hash>`.

    Files whose hashes begin with the same three digits share a lock, which bounds the number of locks. Files
    with different words never share one.
    """
    word, _, key = file.stem.rpartition("-")
    return folder / f"{word}{key[:3]}.lock"


class Waiting:
    """Says what is waited for and since when, at the first call and then once a minute.

    Args:
        what: what is waited for, as a sentence without its end.
        say: takes the text.
        every_seconds: time between two texts.
    """

    def __init__(self, what: str, say: Callable[[str], None], every_seconds: float = 60.0):
        self._what, self._say, self._every = what, say, every_seconds
        self._since, self._begun, self._due = "", 0.0, 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if not self._since:
            self._since, self._begun = time.strftime("%H:%M:%S"), now
        if now >= self._due:
            self._due = now + self._every
            self._say(f"{self._what}, waiting since {self._since} ({now - self._begun:.0f} s).")


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock at `path` within the block; wait for another holder first.

    Where no lock can be made (a read-only folder, a file system without locks), the block runs without one:
    either nothing can be written there, or atomic writes keep every file whole.

    Args:
        path: of the lock file.
        on_wait: called at every poll while another block holds the lock; may raise to stop waiting.
    """
    while True:
        with try_locked(path) as is_ours:
            if is_ours:
                yield
                return
        on_wait()
        time.sleep(_POLL_SECONDS)


@contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """`locked` without waiting: yields False if another process or block holds the lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        release = _acquired(path)
    except OSError as error:
        _say_without(path.parent, error.strerror or str(error))
        yield True
        return
    try:
        yield release is not None
    finally:
        if release is not None:
            release()


def _acquired(path: Path) -> Callable[[], None] | None:
    """Releases the lock at `path`, which is taken now; None if somebody has it.

    `flock` itself is called, because versions of filelock differ in what they make of a drive without locks:
    a lock that somebody has, or a marker that a killed process leaves behind.

    Raises:
        OSError: no lock can be made there.
    """
    if fcntl is None:
        return _acquired_on_windows(path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in _TAKEN:
            raise
        if error.errno == errno.EACCES:
            _check_locks(path.parent)
        return None
    return partial(os.close, handle)


def _acquired_on_windows(path: Path) -> Callable[[], None] | None:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock.release


def _check_locks(folder: Path) -> None:
    """Raises OSError if a file that nobody else knows cannot be locked in `folder`."""
    path = folder / f".{secrets.token_hex(8)}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
        with suppress(OSError):
            path.unlink()


@lru_cache
def _say_without(folder: Path, reason: str) -> None:
    """Log, once for each folder and reason, that its files are not locked."""
    logger.warning(
        "there are no locks in %s (%s): of several processes that use this folder, each may train the same "
        "step",
        folder,
        reason,
    )
