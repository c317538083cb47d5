"""Weights that lie in no file yet, such as a host's model with LoRAs on it, kept as a checkpoint that is named by its content."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import ModelError
from .eviction import Evictor, hold, remove
from .loading import Source, source_of
from .locks import lock_of, locked
from .safetensor_files import write_atomically

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_RECENT_SECONDS = 3600.0
"""How long a file counts as used by another process: short, for writing it again takes less than a step."""


def keep_weights(
    folder: Path, tensors: Mapping[str, Tensor], on_tensor: Callable[[int, int], None] = lambda done, count: None,
    largest_bytes: int = 32 << 30,
) -> Source:  # fmt: skip
    """The file `<its SHA-256>.safetensors` of these tensors in `folder`; it is written only if it is not there.

    One tensor at a time is moved to the CPU: once to name the file and once to write it, so it must give the same values twice.
    `on_tensor(done, count)` runs for each and may raise to cancel, also while another process writes this file.

    Of other such files the least recently used go first when all are larger than `largest_bytes`. A file stays while
    this process has the `Source` that was returned for it. It also stays for an hour after its last use by any
    process, unless the disk is nearly full. Deleting the folder is always safe: the same tensors make the same file.

    Raises:
        ModelError: a tensor's dtype cannot hold what a step changes.
        CheckpointError: the folder cannot be written or is full.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that every tensor is aligned
    done, end = 0, 0
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ModelError(f"{name!r} is held as {str(tensor.dtype).removeprefix('torch.')}, which cannot hold what a step changes; load "
                             "the model in fp16, bf16 or fp32.")  # fmt: skip
        begin, end = end, end + tensor.element_size() * math.prod(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[bytes | memoryview]:
        nonlocal done
        yield struct.pack("<Q", len(text)) + text
        for name in names:
            on_tensor(done, 2 * len(names))
            tensor = tensors[name].to("cpu").detach().contiguous()
            if _DTYPES.get(tensor.dtype) != header[name]["dtype"] or list(tensor.shape) != header[name]["shape"]:
                raise ModelError(f"{name!r} turned from {tensors[name].dtype} into {tensor.dtype} when it was read; load the model again.")
            yield memoryview(tensor.flatten().view(torch.uint8).numpy())
            done += 1

    digest = hashlib.sha256()
    for block in blocks():
        digest.update(block)
    path, locks = folder / f"{digest.hexdigest()}.safetensors", folder / "locks"
    evictor = Evictor([folder], locks, largest_bytes, _RECENT_SECONDS)
    with locked(lock_of(locks, path), lambda: on_tensor(done, 2 * len(names))):  # nobody evicts it meanwhile
        evictor.touch(path)
        source = _whole(path)
        if source is None:
            evictor.evict(len(text) + end)
            source = _written(path, blocks)
        hold(path, source)
        return source


def _whole(path: Path) -> Source | None:
    """The file of that content; None if it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        source = source_of(path)
    except ModelError:
        return None
    return source if source.sha256 == path.stem else None


def _written(path: Path, blocks: Callable[[], Iterator[bytes | memoryview]]) -> Source:
    def write(file: BinaryIO) -> None:
        for block in blocks():
            file.write(block)

    write_atomically(path, write)
    source = source_of(path)
    if source.sha256 != path.stem:
        remove(path)
        raise ModelError("The model's weights changed while they were written; run the graph again.")
    return source
