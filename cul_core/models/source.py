"""Where pretrained weights come from: an identity, and a reader of tensors."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..base.errors import ModelError
from ..files.safetensors_format import opened, read_header


class Source(ABC):
    """The pretrained weights W0 of a model. Equal `sha256` is the same source, wherever it lies.

    Attributes:
        name: what users see.
        size: bytes.
        sha256: hash of the contents, 64 hexadecimal digits.
    """

    name: str
    size: int
    sha256: str

    @abstractmethod
    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint key, tensor on the CPU as it is stored), one at a time.

        Raises:
            ModelError: it can no longer be read.
        """


@dataclass(frozen=True)
class FileSource(Source):
    """A checkpoint file; `sha256` is over the whole file."""

    path: Path
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        with opened(self.path) as file:
            for key in keys:
                yield key, file.get_tensor(key)


def source_of(path: Path) -> FileSource:
    """Identify a file by content; the hash is computed once per (path, size, modification time).

    Raises:
        ModelError: the file is missing, cut short or no safetensors file.
    """
    read_header(path)
    try:
        status = path.stat()
        return FileSource(path, status.st_size, _sha256(path.resolve(), status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise ModelError(f"{path.name!r} can no longer be read ({error.strerror}); put it back.") from error


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
