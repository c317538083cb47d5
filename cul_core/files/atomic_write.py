"""Atomic file writes: a temporary file in the target folder, flushed to disk, then renamed."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..base.errors import CheckpointError
from .paths import check_name

LEFTOVER = ".cul-part"
"""Ending of a temporary file that is not complete yet."""
_OLD_SECONDS = 86400
_REPLACE_TRIES, _REPLACE_WAIT_SECONDS = 6, 0.1


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file in the target folder, flush it to disk, and rename it to `path`.

    A symbolic link at `path` is replaced; its target stays as it is.

    Raises:
        CheckpointError: the folder cannot be written or is full, the name is impossible, or the system denies
            the replacement because a program has the old file open. The temporary file is removed then.
    """
    check_name(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_leftovers(path.parent)
        handle, temporary = _created_beside(path)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
        temporary = None
        _flush_folder(path.parent)
    except OSError as error:
        remedy = "close what has it open" if isinstance(error, PermissionError) else "free some space there"
        failure = f"could not be written to {str(path.parent)!r} ({error.strerror or error})"
        raise CheckpointError(f"{path.name!r} {failure}; {remedy} or choose another folder.") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _created_beside(path: Path) -> tuple[int, Path]:
    """(descriptor, path) of a new file beside `path`, with mode 0o666 less the umask."""
    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{LEFTOVER}")
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue  # another process has this name


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, retrying for half a second while a program has `path` open.

    Windows denies the rename meanwhile; a virus scanner closes the file in a moment.
    """
    for _ in range(_REPLACE_TRIES - 1):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(_REPLACE_WAIT_SECONDS)
    os.replace(temporary, path)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk where the system can, so that a rename survives a power failure."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def leftovers(folder: Path, stem: str = "*") -> Iterator[Path]:
    """Temporary files of writes that were killed, in a folder, for target files with this stem."""
    return folder.glob(f".{stem}.*{LEFTOVER}")


def _remove_old_leftovers(folder: Path) -> None:
    """Remove leftovers older than a day: no write takes that long, so their processes were killed."""
    for path in leftovers(folder):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                path.unlink()
