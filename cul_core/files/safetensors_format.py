"""Safetensors files: strict header parsing, reading without memory mapping, and atomic or sealed writing."""

from __future__ import annotations

import hashlib
import json
import math
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..base.errors import CheckpointError, ModelError, brief_repr
from .atomic_write import write_atomically

_LARGEST_HEADER = 50_000_000
"""Bytes: half of the format's own limit, because a header is read several times."""
_MOST_VALUES = 1_000_000
"""JSON values in a header, counted by commas and opening brackets: they cost the time and memory of parsing.

Stable Diffusion XL reaches it, at 40 MB, with 200 steps of all its weights in its history.
"""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Format code -> dtype, of the dtypes that are written."""
_ONLY_READ = {
    "I16": torch.int16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
EDITABLE = {code: DTYPES[code] for code in ("F16", "BF16", "F32")}
"""Format code -> dtype, of weights that an edit can be added to."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_BITS = {code: 8 * dtype.itemsize for code, dtype in (DTYPES | _ONLY_READ).items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "U16": 16,
    "U32": 32,
    **dict.fromkeys(("C64", "U64"), 64),
}
"""Format code -> bits of one element, also of dtypes that are neither read nor written."""
_MISFITS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Exceptions that parsing a malformed header raises."""
_SEAL = "sha256"
"""Name of the tensor that holds a sealed file's SHA-256."""


class _HeaderTooLarge(ValueError):
    """A header is larger than this module reads, though it may be valid."""


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """(tensor entries by name, metadata, offset of the first data byte) of a safetensors file.

    The entries are checked: every dtype is known, every tensor is as long as its shape says, no name is there
    twice, and the data have neither gaps nor overlaps.

    Raises:
        ModelError: the file is missing, a pickle, not a safetensors file, or truncated.
    """
    if path.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth"):
        raise ModelError(
            f"{brief_repr(path.name)} is a pickle, which can run code when opened; convert it to "
            ".safetensors and choose that file."
        )
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a folder, pipe or device")
        size = status.st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= size - 8:
                raise ValueError("impossible header length")
            if length > _LARGEST_HEADER:
                raise _HeaderTooLarge
            header, metadata, end = _checked(file.read(length))
    except FileNotFoundError as error:
        raise ModelError(
            f"There is no file {brief_repr(path.name)} in {brief_repr(str(path.parent))}; check the name."
        ) from error
    except _HeaderTooLarge as error:
        raise ModelError(
            f"{brief_repr(path.name)} has a header of more than {_LARGEST_HEADER // 1_000_000} MB or "
            f"{_MOST_VALUES:,} values, which is not read here; save it again with less metadata."
        ) from error
    except (OSError, struct.error, *_MISFITS) as error:
        raise ModelError(
            f"{brief_repr(path.name)} cannot be read as a safetensors file; choose a .safetensors "
            "checkpoint or download it again."
        ) from error
    if size != 8 + length + end:
        raise ModelError(
            f"{path.name!r} has {size} bytes where its header announces {8 + length + end}, so it is "
            "truncated or altered; copy or download it again."
        )
    return header, metadata, 8 + length


def check_header(text: bytes) -> None:
    """Raises ValueError for a header that is larger than this module reads."""
    if len(text) > _LARGEST_HEADER or sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise _HeaderTooLarge("header too large")


def _checked(text: bytes) -> tuple[dict[str, dict], dict[str, str], int]:
    """(tensor entries by name, metadata, bytes of the data) of a header's text; raises one of `_MISFITS`."""
    header = _parsed(text)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    return header, metadata, _check_entries(header, metadata)


def _parsed(text: bytes) -> dict[str, dict]:
    """The JSON object of a header that every reader parses alike: UTF-8, no duplicate key, no NaN or
    infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a duplicate key")
        return values

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not valid JSON")

    check_header(text)
    if text[:1] != b"{":
        raise ValueError("does not begin with a brace")
    return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


def _check_entries(header: dict[str, dict], metadata: dict[str, str]) -> int:
    """Bytes of the data. Raises ValueError, KeyError, TypeError or AttributeError for invalid entries."""
    for text in (*header, *metadata.keys(), *metadata.values()):
        text.encode()  # raises for lone surrogates
    spans = []
    for entry in header.values():
        if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["shape"], list):
            raise ValueError("not the entry of a tensor")
        begin, end = entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in (begin, end, *entry["shape"])):
            raise ValueError("a size that is not a whole number")
        bits = _BITS[entry["dtype"]]
        for number in entry["shape"]:
            if (bits := bits * number) >= 1 << 66:
                raise ValueError("impossible shape")
        if bits != 8 * (end - begin):
            raise ValueError("a tensor whose length does not match its shape")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("tensors overlap, or have gaps between them")
        position = end
    return position


class OpenedFile:
    """The tensors of an open safetensors file, by name.

    Tensors are read, not memory-mapped: each owns its memory, and later changes of the file do not reach it.

    Attributes:
        name: the file's name.
        header: tensor entries by name.
        metadata: text by name.
    """

    def __init__(
        self, file: BinaryIO, header: Mapping[str, dict], metadata: Mapping[str, str], start: int, name: str
    ):
        self.name, self.header, self.metadata = name, header, metadata
        self._file, self._start = file, start

    def keys(self) -> list[str]:
        """Names of the tensors, in the header's order."""
        return list(self.header)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in the file's dtype.

        Raises:
            ModelError: the file cannot be read, became shorter, or has a dtype that PyTorch lacks.
        """
        entry = self.header[name]
        if (dtype := (DTYPES | _ONLY_READ).get(entry["dtype"])) is None:
            raise ModelError(
                f"{self.name!r} stores {brief_repr(name)} as {entry['dtype']}, which cannot be read; choose "
                "an fp16, bf16 or fp32 checkpoint."
            )
        tensor = torch.empty(entry["shape"], dtype=dtype)
        data = _bytes_of(tensor)
        try:
            self._file.seek(self._start + entry["data_offsets"][0])
            if self._file.readinto(data) == len(data):
                return tensor
            reason = "it became shorter"
        except OSError as error:
            reason = error.strerror
        raise ModelError(f"{self.name!r} can no longer be read ({reason}); copy or download it again.")


@contextmanager
def opened(path: Path) -> Iterator[OpenedFile]:
    """Open a safetensors file for reading within the block.

    Raises:
        ModelError: the file cannot be read, or its header is invalid; see `read_header`.
    """
    header, metadata, start = read_header(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ModelError(f"{path.name!r} can no longer be read ({error.strerror}); put it back.") from error
    with file:
        yield OpenedFile(file, header, metadata, start, path.name)


def tensor_entries(tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    """Header entries by name, in the order of the data.

    Tensors with larger elements come first, so that every tensor is aligned to its element size.

    Raises:
        CheckpointError: a tensor has a dtype that this module does not write.
    """
    entries, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{brief_repr(name)} is {dtype}, which is not written; convert it to fp32.")
        begin, end = end, end + tensor.element_size() * math.prod(tensor.shape)
        shape = list(tensor.shape)
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    return entries


def packed_header(
    name: str,
    entries: Mapping[str, dict],
    metadata: Mapping[str, str],
    alignment: int = 8,
    start: int = 0,
) -> bytes:
    """The first bytes of a file: the length of its header, and the header, padded with spaces.

    Args:
        name: file name, for errors.
        entries: header entries; see `tensor_entries`.
        metadata: text by name.
        alignment: bytes; the offset of the data is made congruent to `start` modulo this.
        start: bytes; offset of the data in a source file from which whole pages are copied, else 0.

    Raises:
        CheckpointError: the header is larger than `read_header` reads, or invalid.
    """
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * ((start - 8 - len(text)) % alignment)
    try:
        _checked(text)
    except _MISFITS as error:
        raise CheckpointError(
            f"{name!r} could not be read again ({brief_repr(str(error))}); begin with a file that holds "
            "less metadata, or train fewer iterations."
        ) from error
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; equal tensors and metadata give equal bytes.

    Tensors are copied from their device one at a time.

    Raises:
        CheckpointError: the folder cannot be written or is full, a dtype is not written, or the header is too
            large. No partial file is left.
    """
    entries = tensor_entries(tensors)
    header = packed_header(path.name, entries, metadata)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for name in entries:
            file.write(_bytes_of(tensors[name]))

    write_atomically(path, write)


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_tensors` with one more tensor at the end: the SHA-256 of all bytes before it.

    Raises:
        CheckpointError: see `write_tensors`; or a tensor has the name of the seal.
    """
    entries = tensor_entries(tensors)
    if _SEAL in entries:
        raise CheckpointError(
            f"{path.name!r} has a tensor called {_SEAL!r}, the name of the seal; rename the tensor."
        )
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    seal = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    header = packed_header(path.name, {**entries, _SEAL: seal}, metadata)

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for part in (header, *(_bytes_of(tensors[name]) for name in entries)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())

    write_atomically(path, write)


def read_sealed(path: Path, unsealed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file by `write_sealed`; the tensors are on the CPU and own their memory.

    Args:
        path: the file.
        unsealed: whether a file without a seal, by an older version, is read too.

    Raises:
        ModelError: the file is missing, or is no safetensors file.
        CheckpointError: the contents do not match the seal.
    """
    header, metadata, start = read_header(path)
    damaged = CheckpointError(
        f"{path.name!r} is damaged: its contents differ from those that were written; remove it."
    )
    if _SEAL not in header and not unsealed:
        raise damaged
    tensors, digest = {}, hashlib.sha256()
    try:
        with path.open("rb") as file:
            digest.update(file.read(start))
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                (begin, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
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


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(values.sum(dtype=torch.float32).isfinite() or values.isfinite().all())  # the sum is faster


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; a view of its memory if it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
