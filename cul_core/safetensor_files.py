"""Safetensors files without their weights: reading a header, and writing so that nothing half-written is ever left."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, ModelError

_LARGEST_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SEAL = "sha256"
_LEFTOVER, _OLD_SECONDS = ".cul-part", 86400


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
        _remove_old_leftovers(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=_LEFTOVER, dir=path.parent)
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
            with suppress(OSError):
                temporary.unlink()


def leftovers(folder: Path, stem: str = "*") -> Iterator[Path]:
    """What a process that was killed while it wrote has left in a folder; `stem` is that of its file."""
    return folder.glob(f".{stem}.*{_LEFTOVER}")


def _remove_old_leftovers(folder: Path) -> None:
    """No write takes a day: what is older was left by a process that was killed."""
    for path in leftovers(folder):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                path.unlink()


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file whose last entry is the SHA-256 of all before it; one tensor at a time is copied from its device.

    Raises:
        CheckpointError: the folder cannot be written or is full; nothing is left behind then.
    """
    codes, header, end = {dtype: code for code, dtype in _DTYPES.items()}, {"__metadata__": dict(metadata)}, 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each is aligned to its own size
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": codes[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    header[_SEAL] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for part in (struct.pack("<Q", len(text)), text, *(_bytes_of(tensors[name]) for name in names)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())

    write_atomically(path, write)


def read_sealed(path: Path, unsealed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file by `write_sealed`, in memory of their own, so that nothing happens to them when the file changes.

    Args:
        path: the file.
        unsealed: whether a file without a seal, by an older version, is read too.

    Raises:
        ModelError: there is no such file, or it is no safetensors file.
        CheckpointError: its contents are not what was written.
    """
    header, metadata, start = read_header(path)
    damaged = CheckpointError(f"{path.name!r} is damaged: its contents are not those that were written; remove it.")
    if _SEAL not in header and not unsealed:
        raise damaged
    tensors, digest = {}, hashlib.sha256()
    try:
        with path.open("rb") as file:
            digest.update(file.read(start))
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                (begin, end), dtype = entry["data_offsets"], _DTYPES[entry["dtype"]]
                if file.tell() != start + begin or math.prod(entry["shape"]) * dtype.itemsize != end - begin:
                    raise damaged
                tensor = torch.empty(entry["shape"], dtype=dtype)
                data = _bytes_of(tensor)
                if file.readinto(data) != len(data):
                    raise damaged
                if name == _SEAL:
                    if bytes(data) != digest.digest():
                        raise damaged
                else:
                    tensors[name] = tensor
                    digest.update(data)
    except (OSError, KeyError, RuntimeError) as error:
        raise damaged from error
    return tensors, metadata


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory if it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
