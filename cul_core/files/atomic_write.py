"""Safetensors files without their weights: reading a header, and writing so that nothing half-written is ever
left."""

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
"""Ending of a file that is not whole yet."""
_OLD_SECONDS = 86400
_REPLACE_TRIES, _REPLACE_WAIT_SECONDS = 6, 0.1


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file in the target folder, flush that to disk, and rename it to `path`.

    A link of that name is replaced; what it points to stays as it is.

    Raises:
        CheckpointError: the folder cannot be written or is full, no file can have that name, or the system
            does not replace the old file because a program has it open. Whatever was written is removed.
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
    """(descriptor, path) of a new file in the folder of `path`, with the mode that the umask leaves of
    0o666."""
    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{LEFTOVER}")
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue  # another process's


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, waiting a little where a program has `path` open.

    Windows denies it then. The program may be a virus scanner, which is done in a moment.
    """
    for _ in range(_REPLACE_TRIES - 1):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(_REPLACE_WAIT_SECONDS)
    os.replace(temporary, path)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that a rename outlives a crash of the machine; not every system
    can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def leftovers(folder: Path, stem: str = "*") -> Iterator[Path]:
    """What a process that was killed while it wrote has left in a folder; `stem` is that of its file."""
    return folder.glob(f".{stem}.*{LEFTOVER}")


def _remove_old_leftovers(folder: Path) -> None:
    """No write takes a day: what is older was left by a process that was killed."""
    for path in leftovers(folder):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                path.unlink()
