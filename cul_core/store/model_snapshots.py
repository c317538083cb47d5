"""Weights that lie in no file yet, such as a host's model with LoRAs on it, kept as a checkpoint that is
named by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..base.errors import ModelError
from ..files.atomic_write import write_atomically
from ..files.locks import lock_of, locked
from ..files.safetensors_format import DTYPES, EDITABLE, packed_header, tensor_entries
from ..models.source import FileSource, source_of
from .eviction import Evictor, hold, remove

_KEPT = {*EDITABLE.values(), torch.int64}  # old checkpoints hold positions as whole numbers
_RECENT_SECONDS = 3600.0
"""How long a file counts as used by another process: short, for writing it again takes less than a step."""


def snapshot_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    on_tensor: Callable[[int, int], None] = lambda done, count: None,
    largest_bytes: int = 32 << 30,
) -> FileSource:
    """The file `<its SHA-256>.safetensors` of these tensors in `folder`; it is written only if it is not
    there.

    One tensor at a time is moved to the CPU: once to name the file and once to write it, so it must give the
    same values twice. `on_tensor(done, count)` runs for each and may raise to cancel, also while another
    process writes this file.

    Of other such files the least recently used go first when all are larger than `largest_bytes`. A file
    stays while this process has the `Source` that was returned for it. It also stays for an hour after its
    last use by any process, unless the disk is nearly full. Deleting the folder is always safe: the same
    tensors make the same file.

    Raises:
        ModelError: a tensor's dtype cannot hold what a step changes.
        CheckpointError: the folder cannot be written or is full.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _KEPT:
            held = f"{name!r} is held as {str(tensor.dtype).removeprefix('torch.')}"
            raise ModelError(
                f"{held}, which cannot hold what a step changes; load the model in fp16, bf16 or fp32."
            )
    entries, done = tensor_entries(tensors), 0
    header = packed_header("the file of the model", entries, {"format": "pt"})

    def blocks() -> Iterator[bytes | memoryview]:
        nonlocal done
        yield header
        for name, entry in entries.items():
            on_tensor(done, 2 * len(entries))
            tensor = tensors[name].to("cpu").detach().contiguous()
            if tensor.dtype != DTYPES[entry["dtype"]] or list(tensor.shape) != entry["shape"]:
                raise ModelError(
                    f"{name!r} turned from {tensors[name].dtype} into {tensor.dtype} when it was read; load "
                    "the model again."
                )
            yield memoryview(tensor.flatten().view(torch.uint8).numpy())
            done += 1

    digest = hashlib.sha256()
    for block in blocks():
        digest.update(block)
    path, locks = folder / f"{digest.hexdigest()}.safetensors", folder / "locks"
    evictor = Evictor([folder], locks, largest_bytes, _RECENT_SECONDS)
    # nobody evicts it meanwhile
    with locked(lock_of(locks, path), lambda: on_tensor(done, 2 * len(entries))):
        evictor.touch(path)
        source = _whole(path)
        if source is None:
            evictor.evict(len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
            source = _written(path, blocks)
        hold(path, source)
        return source


def _whole(path: Path) -> FileSource | None:
    """The file of that content; None if it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        source = source_of(path)
    except ModelError:
        return None
    return source if source.sha256 == path.stem else None


def _written(path: Path, blocks: Callable[[], Iterator[bytes | memoryview]]) -> FileSource:
    def write(file: BinaryIO) -> None:
        for block in blocks():
            file.write(block)

    write_atomically(path, write)
    source = source_of(path)
    if source.sha256 != path.stem:
        remove(path)
        raise ModelError("The model's weights changed while they were written; run the graph again.")
    return source
