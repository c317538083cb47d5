"""Snapshots of a host's model, such as one with LoRAs, as checkpoints named by their content hash."""

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

_KEPT = {*EDITABLE.values(), torch.int64}  # old checkpoints store position ids as int64
_RECENT_SECONDS = 3600.0
"""How long a file counts as used by another process; short, because rewriting it is faster than a step."""


def snapshot_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    on_tensor: Callable[[int, int], None] = lambda done, count: None,
    largest_bytes: int = 32 << 30,
) -> FileSource:
    """The source `<SHA-256>.safetensors` of these tensors in `folder`; written only if it is not there.

    Tensors move to the CPU one at a time, once for the hash and once for the file, so a tensor must give the
    same values twice.

    Beyond `largest_bytes`, the least recently used snapshots are evicted. A snapshot stays while this process
    holds its `Source`, and for an hour after its last use by any process unless the disk is nearly full.
    Deleting the folder is always safe: the same tensors make the same file.

    Args:
        folder: of the snapshots.
        tensors: checkpoint key -> tensor on any device.
        on_tensor: called with (tensors read, twice their number), also while another process writes this
            file; may raise to cancel.
        largest_bytes: bound on all snapshots together.

    Raises:
        ModelError: a tensor's dtype cannot hold an edit.
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
    # the lock keeps other processes from evicting the file
    with locked(lock_of(locks, path), lambda: on_tensor(done, 2 * len(entries))):
        evictor.touch(path)
        source = _whole(path)
        if source is None:
            evictor.evict(len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
            source = _written(path, blocks)
        hold(path, source)
        return source


def _whole(path: Path) -> FileSource | None:
    """The source in a snapshot's file; None if the file is missing or its hash is not its name."""
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
