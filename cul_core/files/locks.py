"""File locks between processes that share a folder; the operating system frees those of a killed process."""

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
    """Path of the lock in `folder` for a file named `<hash>` or `<word>-<hash>`.

    Files whose hashes begin with the same three digits share a lock, which bounds the number of locks. Files
    with different words never share one.
    """
    word, _, key = file.stem.rpartition("-")
    return folder / f"{word}{key[:3]}.lock"


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
