"""Sources of pretrained weights: identity by content hash, and reading of tensors."""

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

ZERO_SNR = "velocity with zero SNR"
PREDICTIONS = ("auto", "noise", "velocity", ZERO_SNR)
"""What a user may say that a network predicts; zero SNR is that of a schedule that ends in pure noise."""


class Source(ABC):
    """The pretrained weights W0 of a model; sources with equal `sha256` are the same, wherever they lie.

    Attributes:
        name: name that users see.
        size: bytes.
        sha256: content hash, 64 hexadecimal digits.
    """

    name: str
    size: int
    sha256: str

    @property
    def identity(self) -> str:
        """Text that is equal for sources of which every step has the same result."""
        return self.sha256

    @abstractmethod
    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint key, tensor on the CPU in the stored dtype) pairs, read one at a time.

        Raises:
            ModelError: the source can no longer be read.
        """


@dataclass(frozen=True)
class FileSource(Source):
    """A checkpoint file as source; `sha256` is that of the whole file.

    `prediction` is what the user says that its network predicts, one of `PREDICTIONS`.
    """

    path: Path
    size: int
    sha256: str
    prediction: str = "auto"

    @property
    def identity(self) -> str:
        return self.sha256 if self.prediction == "auto" else f"{self.sha256} {self.prediction}"

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        with opened(self.path) as file:
            for key in keys:
                yield key, file.get_tensor(key)


def source_of(path: Path, prediction: str = "auto") -> FileSource:
    """The source of a checkpoint file; its hash is computed once per (path, size, modification time).

    Raises:
        ModelError: the file is missing, truncated or no safetensors file.
    """
    read_header(path)
    try:
        status = path.stat()
        sha256 = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
        return FileSource(path, status.st_size, sha256, prediction)
    except OSError as error:
        raise ModelError(f"{path.name!r} can no longer be read ({error.strerror}); put it back.") from error


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
