"""Atomic file writes: a temporary file in the target folder, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..base.errors import CheckpointError
from .paths import check_name, check_room

LEFTOVER = ".cul-part"
"""Ending of a temporary file that is not complete yet."""
_OLD_SECONDS = 86400
_REPLACE_TRIES, _REPLACE_WAIT_SECONDS = 6, 0.1
_NO_FLUSH = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EPERM,
    errno.EACCES,
}
"""Errors of a flush that mean that the drive knows no such call, not that data are lost."""
_NO_SUCH_CALL = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_OPEN_ELSEWHERE = {errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY}
_REMEDIES = {
    **dict.fromkeys(_OPEN_ELSEWHERE, "close what has it open or choose another folder"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there or choose another folder"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EFBIG: "choose a drive that takes files of this size",
}
_LONGEST_TAG = 80
"""Bytes of a stem that the name of a temporary file always has room for."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file in the target folder, flush it to disk, and rename it to `path`.

    A symbolic link at `path` is replaced; its target stays as it is. A drive that cannot flush is trusted; on
    one that cannot rename, the finished file is copied to `path`.

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
            _flush_to_disk(file.fileno())
        if _replace(temporary, path):
            temporary = None
        _flush_folder(path.parent)
    except OSError as error:
        failure = f"could not be written to {str(path.parent)!r} ({error.strerror or error})"
        remedy = _REMEDIES.get(error.errno, "choose another folder")
        raise CheckpointError(f"{path.name!r} {failure}; {remedy}.") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def rehearse(path: Path, size: int = 0) -> None:
    """Do what `write_atomically` will do at `path`, with a file of another name of the same length.

    Args:
        path: of the file that will be written.
        size: bytes of that file, as far as they are known; the file of the rehearsal has one.

    Raises:
        CheckpointError: see `write_atomically`; or the disk has no room for `size` bytes.
    """
    check_name(path)
    length = max(len(os.fsencode(path.name)), len(LEFTOVER) + 2)
    probe = path.with_name(f".{secrets.token_hex(length)[: length - len(LEFTOVER) - 1]}{LEFTOVER}")

    def write(file: BinaryIO) -> None:
        check_room(path, size)
        try:
            file.seek(size)
        except OSError as error:  # such as on FAT32, beyond 4 GiB
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from error
        file.seek(0)
        file.write(b"x")

    try:
        write_atomically(probe, write)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(probe.name, path.name)) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _created_beside(path: Path) -> tuple[int, Path]:
    """(descriptor, path) of a new file beside `path`, with mode 0o666 less the umask."""
    while True:
        temporary = path.with_name(f".{_tag(path)}.{secrets.token_hex(4)}{LEFTOVER}")
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue  # another process has this name


def _tag(path: Path) -> str:
    """The stem of `path`, cut so that the temporary file's name fits wherever that of `path` fits."""
    longest = max(len(os.fsencode(path.name)) - len(LEFTOVER) - 10, _LONGEST_TAG)
    return os.fsencode(path.stem)[:longest].decode(errors="ignore")


def _flush_to_disk(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _replace(temporary: Path, path: Path) -> bool:
    """Rename `temporary` to `path`; False if it was copied, because the drive cannot rename.

    The rename is tried for half a second while a program has `path` open: Windows denies it meanwhile, and a
    virus scanner closes the file in a moment.
    """
    for _ in range(_REPLACE_TRIES - 1):
        try:
            os.replace(temporary, path)
            return True
        except OSError as error:
            if error.errno in _NO_SUCH_CALL:
                return _copy(temporary, path)
            if error.errno not in _OPEN_ELSEWHERE:
                raise
            time.sleep(_REPLACE_WAIT_SECONDS)
    os.replace(temporary, path)
    return True


def _copy(temporary: Path, path: Path) -> bool:
    try:
        shutil.copyfile(temporary, path)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
    return False


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
