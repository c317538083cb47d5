"""From one .safetensors file to a `DiffusersNetwork`, offline, and the map between diffusers names and
checkpoint keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..base.errors import ModelError
from ..files.safetensors_format import read_header


@dataclass(frozen=True)
class Source:
    """The file a model comes from; `sha256` is over the whole file. Equal contents are the same source
    wherever they lie."""

    path: Path
    size: int
    sha256: str


def source_of(path: Path) -> Source:
    """Identify a file by content; the hash is computed once per (path, size, modification time).

    Raises:
        ModelError: the file is missing, cut short or no safetensors file.
    """
    read_header(path)
    try:
        status = path.stat()
        return Source(path, status.st_size, _sha256(path.resolve(), status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise ModelError(f"{path.name!r} can no longer be read ({error.strerror}); put it back.") from error


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
