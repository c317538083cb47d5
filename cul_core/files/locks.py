"""Locks between processes that share a folder. The operating system holds them: those of a process that was
killed are free at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


def lock_of(folder: Path, file: Path) -> Path:
    """The lock in `folder` of a file named by a hash, maybe behind a word and a dash. A few files share one,
    so that their number has a limit; files with different words never do.
    """
    word, _, key = file.stem.rpartition("-")
    return folder / f"{word}{key[:3]}.lock"


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block no other process is in a block of this path; `on_wait` runs while one is, and may
    raise to wait no longer.

    Where no lock can be made (a read-only folder, a file system without them), the block runs without one:
    nothing can be written there, or every file is whole by itself.
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
    """Like `locked`, but does not wait: false if another process, or another block of this one, holds the
    lock."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        logger.debug("no lock %s: %s", path.name, error)
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
