"""Safetensors files without their weights: reading a header, and writing so that nothing half-written is ever
left."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from ..base.errors import CheckpointError, brief_repr

_RESERVED = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]", re.IGNORECASE)
_LONGEST_PART = 200  # of the 255 bytes that file systems allow; the rest is for counters and the ending


def free_path(path: Path) -> Path:
    """`path`, or the first of `name_2`, `name_3`, ... that does not exist yet: nothing is ever overwritten,
    not even a broken link.

    Raises:
        CheckpointError: no file can have that name here.
    """
    check_name(path)
    candidate, counter = path, 2
    while os.path.lexists(candidate):
        candidate = path.with_name(f"{path.stem}_{counter}{path.suffix}")
        counter += 1
    return candidate


def check_name(path: Path) -> None:
    """Raises CheckpointError when no file can have that name here: no name at all, too long, or with
    characters that no disk knows."""
    try:
        if not path.name:
            raise ValueError("it ends without a name")
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # whoever writes will see
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{brief_repr(str(path))} cannot be the name of a file ({reason}); give another name."
        ) from error


def check_portable(name: str) -> None:
    """Raises CheckpointError when a name typed by a user, which may have folders before it, is not one on
    every system.

    It must not leave the folder it is meant for, nor mean something else than a file to Windows.
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
            reason = "it holds characters that cannot be seen"
        else:
            continue
        raise CheckpointError(
            f"{brief_repr(name)} cannot be the beginning of a file name: {reason}; give another one."
        )


def check_writable(folder: Path) -> None:
    """Make `folder` if need be and try to write in it, before hours of work depend on it.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"The folder {brief_repr(str(folder))} cannot be written ({reason}); choose another one."
        ) from error
