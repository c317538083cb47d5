"""Write and open models: edited checkpoints in the source's layout, and exact fp32 edits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..base.errors import CheckpointError, ModelError, TrainingError, brief_repr
from ..files.atomic_write import write_atomically
from ..files.paths import free_path
from ..files.safetensors_format import EDITABLE, opened, packed_header, read_header, write_tensors
from ..history.step_record import read_history
from ..history.unlearn_model import UnlearnModel
from ..models.load_diffusers import checkpoint_key_map
from ..models.recognize import detect_family
from ..models.source import FileSource, source_of, stored_name

_CHUNK, _PAGE = 8 << 20, 4096
_SHORTER = "The source checkpoint became shorter while it was being copied; leave it in place and save again."
_VALUES = 1 << 18  # added at a time, so that they fit in the CPU cache


def save_checkpoint(
    model: UnlearnModel,
    path: Path | str,
    on_chunk: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the model as a full checkpoint in its source's key layout and dtypes; returns the path written.

    The source is streamed: unedited tensors are copied byte for byte, edited ones replaced. An existing file
    is not overwritten: the name gets a counter.

    Args:
        model: what to write.
        path: of the new file.
        on_chunk: called for every 8 MiB; may raise to cancel, and no partial file is left behind.
        metadata: added to the header's entries.

    Raises:
        CheckpointError: the folder cannot be written, the source's layout is not that of its network, or
            an edited tensor has a dtype that cannot hold the edit.
        ModelError: the source file has changed since the model was opened.
        TrainingError: an edit is not finite, or too large for the source's dtype.
    """
    path = free_path(Path(path))
    model.source.require_unchanged()
    header, inherited, start = read_header(model.source.path)
    stored = {key: stored_name(header, key) for key in model.edits}
    if other := [key for key, name in stored.items() if name is None]:
        raise CheckpointError(
            f"{model.source.name!r} has another layout than its network, without {other[0]!r}; save a LoRA "
            "instead."
        )
    replaced = sorted((tuple(header[name]["data_offsets"]), name, key) for key, name in stored.items())
    for _, name, key in replaced:
        if header[name]["dtype"] not in EDITABLE:
            raise CheckpointError(
                f"{name!r} is stored as {header[name]['dtype']}, which cannot hold an edit; start from an "
                "fp16, bf16 or fp32 checkpoint."
            )
        if not _is_finite(model.edits[key]):
            raise TrainingError(
                f"The edit of {name!r} holds values that are not finite; repeat the step with a lower "
                "learning rate."
            )
    entries = {**inherited, **(metadata or {}), **model.metadata()}
    # the data have the same page offset as in the source, so that the kernel can copy whole pages
    beginning = packed_header(path.name, header, entries, alignment=_PAGE, start=start)

    def write(out: BinaryIO) -> None:
        out.write(beginning)
        with _opened_source(model.source) as source:
            position = 0
            for (begin, end), name, key in replaced:
                _copy(source, out, start + position, begin - position, on_chunk)
                dtype = header[name]["dtype"]
                if not _add(source, out, start + begin, model.edits[key], EDITABLE[dtype]):
                    raise TrainingError(
                        f"The edit of {name!r} is too large for {dtype}, so values are not finite; repeat "
                        "the step with a lower learning rate."
                    )
                position = end
            _copy(source, out, start + position, model.source.size - start - position, on_chunk)
        model.source.require_unchanged()  # it may have changed while it was copied

    write_atomically(path, write)
    return path


def _opened_source(source: FileSource) -> BinaryIO:
    try:
        return source.path.open("rb")
    except OSError as error:
        raise ModelError(
            f"{source.path.name!r} can no longer be read ({error.strerror}); put it back and save again."
        ) from error


def _add(source: BinaryIO, out: BinaryIO, begin: int, edit: Tensor, dtype: torch.dtype) -> bool:
    """Append stored values plus edit, added in fp32; False if a sum is not finite in `dtype`."""
    source.seek(begin)
    data = bytearray(min(edit.numel(), _VALUES) * dtype.itemsize)
    values, sums = torch.frombuffer(data, dtype=dtype), torch.empty(min(edit.numel(), _VALUES))
    for delta in edit.flatten().split(_VALUES):
        count = len(delta)
        if source.readinto(memoryview(data)[: count * dtype.itemsize]) < count * dtype.itemsize:
            raise ModelError(_SHORTER)
        values[:count] = torch.add(values[:count], delta, out=sums[:count])
        if not _is_finite(values[:count]):
            return False
        out.write(memoryview(data)[: count * dtype.itemsize])
    return True


def _is_finite(values: Tensor) -> bool:
    return bool(values.sum(dtype=torch.float32).isfinite() or values.isfinite().all())  # the sum is faster


def _copy(source: BinaryIO, out: BinaryIO, begin: int, length: int, on_chunk: Callable[[], None]) -> None:
    """Append a byte range of one file to another, inside the kernel if possible, else through a buffer."""
    out.flush()
    buffer = None
    while length > 0:
        on_chunk()
        moved = 0
        if buffer is None:
            try:
                moved = os.copy_file_range(source.fileno(), out.fileno(), min(_CHUNK, length), begin)
            # not supported here, or not between these files; a full disk fails again below
            except (AttributeError, OSError):
                pass
        if not moved:
            buffer = memoryview(bytearray(_CHUNK)) if buffer is None else buffer
            source.seek(begin)
            moved = source.readinto(buffer[:length])
            out.write(buffer[:moved])
        if not moved:
            raise ModelError(_SHORTER)
        begin, length = begin + moved, length - moved


def save_edits(model: UnlearnModel, path: Path | str) -> Path:
    """Write the exact fp32 edits with their history; `load_edits` restores the same model, bit for bit."""
    path = free_path(Path(path))
    write_tensors(path, model.edits, model.metadata())
    return path


def load_edits(path: Path | str, source: FileSource) -> UnlearnModel:
    """The model made of `source` and the edits in the file `path`.

    Raises:
        CheckpointError: the edits belong to another source, or an edit fits no weight of it.
    """
    path = Path(path)
    history, made_from = read_history(path)
    if made_from is None or made_from["sha256"] != source.sha256:
        raise CheckpointError(
            f"The edits in {path.name!r} belong to "
            f"{brief_repr(made_from['name'] if made_from else 'no model')}, not to {source.path.name!r}; "
            "open that file instead."
        )
    (header, _, _), (entries, metadata, _) = read_header(source.path), read_header(path)
    keys = current_names(source.path, entries, metadata)
    family = detect_family(source.path)
    for name, entry in entries.items():
        stored = header.get(keys[name]) if keys[name].startswith(family.prefix) else None
        if stored is None or entry["shape"] != stored["shape"] or entry["dtype"] != "F32":
            raise CheckpointError(
                f"The edit {brief_repr(name)} in {path.name!r} fits no weight of {source.path.name!r}; use "
                "the file it was copied from."
            )
    with opened(path) as file:
        edits = {keys[name]: file.get_tensor(name) for name in file.keys()}
    return UnlearnModel(source, family, edits, history)


def current_names(source: Path, names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Name of a weight in an edits file -> its checkpoint key; format 1 has diffusers' names.

    Args:
        source: checkpoint to which the edits belong.
        names: weight names in the edits file.
        metadata: of the edits file.
    """
    if metadata.get("cul_format") != "1":
        return {name: name for name in names}
    known = checkpoint_key_map(source)
    return {name: known.get(name, name) for name in names}


def difference(path: Path, pretrained: Path) -> dict[str, Tensor]:
    """fp32 edits by checkpoint key between two checkpoints of one layout; equal tensors are left out.

    Raises:
        ModelError: the layouts differ.
    """
    prefix = detect_family(pretrained).prefix
    shapes = [
        {key: entry["shape"] for key, entry in read_header(file)[0].items()} for file in (path, pretrained)
    ]
    edits = {}
    with opened(path) as edited, opened(pretrained) as base:
        for key in (key for key in shapes[1] if key.startswith(prefix)):
            if shapes[0].get(key) != shapes[1][key]:
                raise ModelError(
                    f"{path.name!r} lacks {key!r} as {pretrained.name!r} has it, so it was not made from "
                    "that file; choose an unmodified checkpoint."
                )
            delta = edited.get_tensor(key).float() - base.get_tensor(key).float()
            if delta.any():
                edits[key] = delta
    return edits


def open_model(path: Path | str, pretrained: Path | str | None = None) -> UnlearnModel:
    """The model in a checkpoint file, with its history if it was edited.

    Args:
        path: the checkpoint.
        pretrained: the file from which an edited checkpoint was made. Drift is then measured from this file;
            the edits are rounded to the checkpoint's dtype. Without it, the checkpoint's own weights count as
            the pretrained weights.

    Raises:
        ModelError: a file is unreadable or unsupported, or `pretrained` is not the file from which the
            checkpoint was made.
    """
    path = Path(path)
    family = detect_family(path)
    history, made_from = read_history(path)
    own = source_of(path)
    original = own if pretrained is None else source_of(Path(pretrained))
    if original.sha256 == own.sha256:
        return UnlearnModel(own, family, {}, history)
    if made_from is None:
        raise ModelError(
            f"{path.name!r} was not written by continual-unlearning, so {original.path.name!r} cannot be "
            "what it was made from; leave the pretrained file out."
        )
    if original.sha256 != made_from["sha256"]:
        raise ModelError(
            f"{original.path.name!r} is not the file that {path.name!r} was made from; choose "
            f"{brief_repr(made_from['name'])} or leave the pretrained file out."
        )
    return UnlearnModel(original, family, difference(path, original.path), history)


def open_continued(path: Path, candidates: Iterable[Path]) -> UnlearnModel:
    """`open_model`, with `pretrained` looked up among `candidates`.

    Raises:
        ModelError: the file is unreadable or unsupported.
    """
    _, made_from = read_history(path)
    if made_from is not None:
        for other in candidates:
            try:
                same_name = other.name == made_from["name"] and other.stat().st_size == made_from["size"]
                is_source = same_name and source_of(other).sha256 == made_from["sha256"]
            except (OSError, ModelError):
                continue  # a damaged neighbour is not the source
            if is_source:
                return open_model(path, other)
    return open_model(path)
