"""Checks of file names and folders before something is written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ..base.errors import CheckpointError, brief_repr

_RESERVED = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]", re.IGNORECASE)
_LONGEST_PART = 200  # of the 255 bytes that file systems allow; the rest is for counters and the ending


def free_path(path: Path) -> Path:
    """`path`, or the first of `name_2`, `name_3`, ... that does not exist; a broken link counts as existing.

    Raises:
        CheckpointError: the name is impossible here; see `check_name`.
    """
    check_name(path)
    candidate, counter = path, 2
    while os.path.lexists(candidate):
        candidate = path.with_name(f"{path.stem}_{counter}{path.suffix}")
        counter += 1
    return candidate


def check_name(path: Path) -> None:
    """Check that a file can have this name on this system.

    Raises:
        CheckpointError: the name is empty, too long, or has characters that the file system refuses.
    """
    try:
        if not path.name:
            raise ValueError("it ends without a name")
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # the name is possible; the write itself reports these
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{brief_repr(str(path))} cannot be the name of a file ({reason}); give another name."
        ) from error


def check_portable(name: str) -> None:
    """Check that a name typed by a user, maybe with folders before it, is valid on every system.

    Raises:
        CheckpointError: the name leaves its folder (`..`), has reserved characters or a name reserved by
            Windows, or is too long.
    """
    for part in re.split(r"[/\\]", name):
        if re.search(r'[\x00-\x1f\x7f<>:"|?*]', part):
            reason = 'control characters and < > : " | ? * are not allowed'
        elif part in ("", ".", ".."):
            reason = "give a file name, with folders before it or none"
        elif part.endswith((" ", ".")) or part.startswith(" "):
            reason = "a part begins or ends with a space, or ends with a dot"
        elif _RESERVED.fullmatch(part.partition(".")[0].rstrip()):
            reason = f"Windows reserves {part}"
        elif len(part.encode(errors="surrogatepass")) > _LONGEST_PART:
            reason = f"a part is longer than {_LONGEST_PART} bytes"
        elif not part.isprintable():
            reason = "it contains invisible characters"
        else:
            continue
        raise CheckpointError(
            f"{brief_repr(name)} cannot be the beginning of a file name: {reason}; give another one."
        )


def check_writable(folder: Path) -> None:
    """Check that `folder` can be written, before hours of training depend on it; a missing one is made.

    Raises:
        CheckpointError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(b"x")
        with suppress(OSError):  # some drives let nobody remove a file
            os.unlink(name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"The folder {brief_repr(str(folder))} cannot be written ({reason}); choose another one."
        ) from error


def check_room(path: Path, size: int) -> None:
    """Check that the disk of a file has room for `size` bytes; a disk that does not tell passes.

    Raises:
        CheckpointError: it has less.
    """
    try:
        disk = shutil.disk_usage(path.parent)
    except OSError:
        return
    if disk.total and disk.free < size:
        raise CheckpointError(
            f"{path.name!r} needs {size / 1e6:.1f} MB in {str(path.parent)!r}, where only "
            f"{disk.free / 1e6:.1f} MB are left; free some space there or choose another folder."
        )
