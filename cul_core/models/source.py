"""Sources of pretrained weights: identity by content hash, and reading of tensors."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import ModelError
from ..files.safetensors_format import is_finite, opened, read_header

NETWORK_PREFIX = "model.diffusion_model."
"""Prefix of a network's keys in a checkpoint."""
OTHER_PREFIXES = ("diffusion_model.", "net.", "model.", "")
"""Prefixes in files that hold a network alone."""


def stored_name(names: Container[str], key: str) -> str | None:
    """The name of a checkpoint key's tensor in a file with these names; None if its layout is another one."""
    if key in names:
        return key
    tail = key.removeprefix(NETWORK_PREFIX)
    return next((prefix + tail for prefix in OTHER_PREFIXES if prefix + tail in names), None)


ZERO_SNR = "velocity with zero SNR"
PREDICTIONS = ("auto", "noise", "velocity", ZERO_SNR)
"""What a user may say that a network predicts; zero SNR is that of a schedule that ends in pure noise."""


def finite(file_name: str, key: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor in `dtype`.

    Raises:
        ModelError: it holds NaN or infinite values, or some that are too large for `dtype`.
    """
    converted = tensor.to(dtype)
    if is_finite(converted):
        return converted
    if is_finite(tensor.float()):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{file_name!r} holds values in {key!r} that are too large for {name}; choose bfloat16 or "
            "float32."
        )
    raise ModelError(
        f"{file_name!r} is damaged: {key!r} holds NaN or infinite values, as a failed training or merge "
        "leaves them; choose another checkpoint, or the one it was made from."
    )


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

    @abstractmethod
    def require_unchanged(self) -> None:
        """Check that the source still holds the weights that it was opened with.

        Raises:
            ModelError: it does not, or it can no longer be read.
        """


@dataclass(frozen=True)
class FileSource(Source):
    """A checkpoint file as source; `sha256` is that of the whole file.

    Args:
        path: of the file.
        size: see `Source`.
        sha256: see `Source`.
        prediction: what the user says that its network predicts, one of `PREDICTIONS`.
        text: identity of the text encoder of a network whose file has none; empty where the file has it.
    """

    path: Path
    size: int
    sha256: str
    prediction: str = "auto"
    text: str = ""

    @property
    def identity(self) -> str:
        prediction = "" if self.prediction == "auto" else self.prediction
        return " ".join(filter(None, (self.sha256, prediction, self.text)))

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        with opened(self.path) as file:
            names = set(file.keys())
            for key in keys:
                if (name := stored_name(names, key)) is None:
                    raise ModelError(f"{self.name!r} has no weight {key!r}; choose an unmodified file.")
                yield key, file.get_tensor(name)

    def require_unchanged(self) -> None:
        if source_of(self.path).sha256 != self.sha256:
            raise ModelError(
                f"{self.name!r} has changed since the model was opened; put the old file back or start again."
            )


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
