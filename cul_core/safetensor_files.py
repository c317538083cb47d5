"""Safetensors files without their weights: reading a header, and writing so that nothing half-written is ever left."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, ModelError

_LARGEST_HEADER = 100_000_000


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """(tensor entries by name, metadata, offset of the first data byte) of a safetensors file.

    Raises:
        ModelError: no such file, a pickle, not a safetensors file, or one that ends too early.
    """
    if path.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth"):
        raise ModelError(f"{path.name!r} is a pickle, which can run code when opened; convert it to .safetensors and choose that file.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError("impossible header length")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        for entry in header.values():
            begin, end = entry["data_offsets"]
            if not (0 <= begin <= end and isinstance(entry["dtype"], str) and all(isinstance(n, int) for n in entry["shape"])):
                raise ValueError("impossible tensor entry")
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise ModelError(f"There is no file {path.name!r} in {str(path.parent)!r}; check the name.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{path.name!r} cannot be read as a safetensors file; choose a .safetensors checkpoint "
                         "or download it again.") from error  # fmt: skip
    if size != 8 + length + end:
        raise ModelError(f"{path.name!r} has {size} bytes where its header announces {8 + length + end}; it was cut short "
                         "or altered, so copy or download it again.")  # fmt: skip
    return header, metadata, 8 + length


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: the file cannot be read, or its entries contradict each other.
    """
    read_header(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(f"{path.name!r} is a damaged safetensors file ({error}); copy or download it again.") from error


def free_path(path: Path) -> Path:
    """`path`, or the first of `name_2`, `name_3`, ... that does not exist yet: nothing is ever overwritten."""
    candidate, counter = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}_{counter}{path.suffix}")
        counter += 1
    return candidate


def check_writable(folder: Path) -> None:
    """Make `folder` if need be and try to write in it, before hours of work depend on it.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise CheckpointError(f"The folder {str(folder)!r} cannot be written ({error.strerror or error}); choose another one.") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file in the target folder, flush it to disk, and rename it to `path`.

    Raises:
        CheckpointError: the folder cannot be written or is full; whatever was written is removed.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CheckpointError(f"{path.name!r} could not be written to {str(path.parent)!r} ({error.strerror or error}); free some "
                              "space there or choose another folder.") from error  # fmt: skip
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
