"""Write and open models: edited checkpoints in the source's layout, and exact fp32 edits."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..base.errors import CheckpointError, ConfigError, ModelError, TrainingError, brief_repr
from ..files.atomic_write import write_atomically
from ..files.paths import free_path
from ..files.safetensors_format import EDITABLE, is_finite, opened, packed_header, read_header, write_tensors
from ..history.step_record import history_in
from ..history.unlearn_model import UnlearnModel
from ..models.load_diffusers import checkpoint_key_map
from ..models.recognize import chosen_prediction, family_in
from ..models.sampling import generator_for
from ..models.source import FileSource, source_of, stored_name

_CHUNK, _PAGE = 8 << 20, 4096
_SHORTER = "The source checkpoint became shorter while it was being copied; leave it in place and save again."
ROUNDINGS = ("auto", "nearest", "stochastic")
LEAST_KEPT = 0.98
_OF_THE_SOURCE = re.compile(
    r"^(?!ss_|cul_).*(hash|sha-?256|thumbnail|cover_?image|preview_?image)", re.IGNORECASE
)
"""Names of metadata that identify or show the very file they are in; those of kohya's `ss_` name its base."""
_COMPARED = 64
"""Tensors by which a renamed source is looked for."""
_VALUES = 1 << 18  # added at a time, so that they fit in the CPU cache


def save_checkpoint(
    model: UnlearnModel,
    path: Path | str,
    on_chunk: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
    rounding: str = "auto",
    on_message: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the model as a full checkpoint in its source's key layout and dtypes; returns the path written.

    The source is streamed: unedited tensors are copied byte for byte, edited ones replaced. An existing file
    is not overwritten: the name gets a counter.

    Args:
        model: what to write.
        path: of the new file.
        on_chunk: called for every 8 MiB; may raise to cancel, and no partial file is left behind.
        metadata: added to the header's entries.
        rounding: of edited weights to the file's dtype, one of `ROUNDINGS`. `auto` is `nearest` where that
            keeps at least `LEAST_KEPT` of the edit, else `stochastic`, which keeps all of it on average.
        on_message: called with a sentence on how much of the edit the file keeps.

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
        if not is_finite(model.edits[key]):
            raise TrainingError(
                f"The edit of {name!r} holds values that are not finite; repeat the step with a lower "
                "learning rate."
            )
    rounding = _chosen_rounding(model, rounding, on_message)
    entries = {**_still_true(inherited), **(metadata or {}), **model.metadata()}
    # the data have the same page offset as in the source, so that the kernel can copy whole pages
    beginning = packed_header(path.name, header, entries, alignment=_PAGE, start=start)

    def write(out: BinaryIO) -> None:
        out.write(beginning)
        with _opened_source(model.source) as source:
            position = 0
            for (begin, end), name, key in replaced:
                _copy(source, out, start + position, begin - position, on_chunk)
                dtype = header[name]["dtype"]
                generator = (
                    generator_for(0, "rounding", model.content_hash, key)
                    if rounding == "stochastic"
                    else None
                )
                if not _add(source, out, start + begin, model.edits[key], EDITABLE[dtype], generator):
                    raise TrainingError(
                        f"The edit of {name!r} is too large for {dtype}, so values are not finite; repeat "
                        "the step with a lower learning rate."
                    )
                position = end
            _copy(source, out, start + position, model.source.size - start - position, on_chunk)
        model.source.require_unchanged()  # it may have changed while it was copied

    write_atomically(path, write)
    return path


def _chosen_rounding(model: UnlearnModel, rounding: str, on_message: Callable[[str], None]) -> str:
    """The rounding without `auto`; tells what the file keeps of the edit."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding is {brief_repr(rounding)}; choose one of {', '.join(ROUNDINGS)}.")
    if not model.edits:
        return "nearest"
    kept = kept_by_rounding(model)
    if rounding == "auto":
        rounding = "nearest" if kept >= LEAST_KEPT else "stochastic"
    if rounding == "nearest":
        on_message(f"The file's precision keeps {kept:.1%} of the edit.")
    else:
        on_message(
            f"The file's precision would keep {kept:.1%} of the edit, so the weights are rounded up and "
            "down at random, which keeps all of it on average."
        )
    return rounding


def kept_by_rounding(model: UnlearnModel) -> float:
    """Share of the edit that is left when the edited weights are rounded to the nearest in the file's dtype.

    It is <w, e> / <e, e>, with the written change w and the edit e.
    """
    written = total = 0.0
    for name, stored in model.source.read(model.edits):
        edit, before = model.edits[name], stored.float()
        change = (before + edit).to(stored.dtype).float() - before
        written += (change * edit).sum(dtype=torch.float64).item()
        total += edit.square().sum(dtype=torch.float64).item()
    return written / total if total else 1.0


def rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 values in `dtype`, each rounded up or down with the probability that makes its mean exact."""
    nearest = values.to(dtype)
    if dtype == torch.float32:
        return nearest
    left = values - nearest.float()
    bits = nearest.view(torch.int16).int()
    bits = torch.where(nearest == 0, torch.where(left < 0, -0x8000, 0), bits)  # the zero of that sign
    away = (left > 0) == (bits >= 0)  # the magnitude grows towards the value
    other = (bits + torch.where(away, 1, -1)).to(torch.int16).view(dtype)
    step = (other.float() - nearest.float()).abs()
    is_other = torch.rand(values.shape, generator=generator) * step < left.abs()
    return torch.where(is_other, other, nearest)


def _still_true(metadata: Mapping[str, str]) -> dict[str, str]:
    """A source's metadata without what is not true of a file made of it: its hashes, pictures and graph."""
    return {
        name: value
        for name, value in metadata.items()
        if name not in ("prompt", "workflow") and not _OF_THE_SOURCE.search(name)
    }


def _check_source(source: FileSource) -> None:
    if source_of(source.path).sha256 != source.sha256:
        raise ModelError(
            f"{source.path.name!r} has changed since the model was opened; put the old file back or start "
            "again."
        )


def _opened_source(source: FileSource) -> BinaryIO:
    try:
        return source.path.open("rb")
    except OSError as error:
        raise ModelError(
            f"{source.path.name!r} can no longer be read ({error.strerror}); put it back and save again."
        ) from error


def _add(
    source: BinaryIO,
    out: BinaryIO,
    begin: int,
    edit: Tensor,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> bool:
    """Append stored values plus edit, added in fp32; False if a sum is not finite in `dtype`.

    Sums are rounded to the nearest value, or stochastically with a generator.
    """
    source.seek(begin)
    data = bytearray(min(edit.numel(), _VALUES) * dtype.itemsize)
    values, sums = torch.frombuffer(data, dtype=dtype), torch.empty(min(edit.numel(), _VALUES))
    for delta in edit.flatten().split(_VALUES):
        count = len(delta)
        if source.readinto(memoryview(data)[: count * dtype.itemsize]) < count * dtype.itemsize:
            raise ModelError(_SHORTER)
        torch.add(values[:count], delta, out=sums[:count])
        values[:count] = sums[:count] if generator is None else rounded(sums[:count], dtype, generator)
        if not is_finite(values[:count]):
            return False
        out.write(memoryview(data)[: count * dtype.itemsize])
    return True


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
    with opened(path) as file:
        history, made_from = history_in(file.metadata, path.name)
        if made_from is None or made_from["sha256"] != source.sha256:
            raise CheckpointError(
                f"The edits in {path.name!r} belong to "
                f"{brief_repr(made_from['name'] if made_from else 'no model')}, not to "
                f"{source.path.name!r}; open that file instead."
            )
        keys = current_names(source.path, file.header, file.metadata)
        with opened(source.path) as base:
            family = family_in(base, source.prediction)
        for name, entry in file.header.items():
            stored = base.header.get(keys[name]) if keys[name].startswith(family.prefix) else None
            if stored is None or entry["shape"] != stored["shape"] or entry["dtype"] != "F32":
                raise CheckpointError(
                    f"The edit {brief_repr(name)} in {path.name!r} fits no weight of {source.path.name!r}; "
                    "use the file it was copied from."
                )
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
    edits = {}
    with opened(path) as edited, opened(pretrained) as base:
        prefix = family_in(base).prefix
        for key, entry in base.header.items():
            if not key.startswith(prefix):
                continue
            if key not in edited.header or edited.header[key]["shape"] != entry["shape"]:
                raise ModelError(
                    f"{path.name!r} lacks {key!r} as {pretrained.name!r} has it, so it was not made from "
                    "that file; choose an unmodified checkpoint."
                )
            delta = edited.get_tensor(key).float() - base.get_tensor(key).float()
            if delta.any():
                edits[key] = delta
    return edits


def open_model(
    path: Path | str, pretrained: Path | str | None = None, prediction: str = "auto"
) -> UnlearnModel:
    """The model in a checkpoint file, with its history if it was edited.

    Args:
        path: the checkpoint.
        pretrained: the file from which an edited checkpoint was made. Drift is then measured from this file;
            the edits are rounded to the checkpoint's dtype. Without it, the checkpoint's own weights count as
            the pretrained weights.
        prediction: what the network predicts; see `detect_family`; an edited file says what was chosen.

    Raises:
        ModelError: a file is unreadable or unsupported, or `pretrained` is not the file from which the
            checkpoint was made.
    """
    return _open_model(
        Path(path),
        lambda made_from, prediction: pretrained and source_of(Path(pretrained), prediction),
        prediction,
    )


def _open_model(
    path: Path,
    find_source: Callable[[Mapping[str, Any] | None, str], FileSource | None],
    prediction: str,
) -> UnlearnModel:
    with opened(path) as file:
        family = family_in(file, prediction)
        history, made_from = history_in(file.metadata, path.name)
        if prediction == "auto":
            prediction = chosen_prediction(file.metadata)
    own = source_of(path, prediction)
    original = find_source(made_from, prediction) or own
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


def open_continued(path: Path, candidates: Iterable[Path], prediction: str = "auto") -> UnlearnModel:
    """`open_model`, with `pretrained` looked up among `candidates`, whatever its name is now.

    Raises:
        ModelError: the file is unreadable or unsupported.
    """
    return _open_model(
        path,
        lambda made_from, prediction: made_from and _found(path, made_from, candidates, prediction),
        prediction,
    )


def _found(
    path: Path, made_from: Mapping[str, Any], candidates: Iterable[Path], prediction: str
) -> FileSource | None:
    """The source with that size and hash; files of its name first, since hashing takes seconds."""
    for other in sorted(candidates, key=lambda other: other.name != made_from["name"]):
        try:
            may_be = other.stat().st_size == made_from["size"] and (
                other.name == made_from["name"] or _may_be_source(path, other)
            )
            if may_be and (source := source_of(other, prediction)).sha256 == made_from["sha256"]:
                return source
        except (OSError, ModelError):
            continue  # a damaged neighbour is not the source
    return None


def _may_be_source(path: Path, other: Path) -> bool:
    """Whether an edited checkpoint agrees with another file in most of its smallest tensors.

    A step edits matrices; other fine-tunes of the same size differ in norms and biases too.
    """
    header, theirs = read_header(path)[0], read_header(other)[0]
    if {name: entry["shape"] for name, entry in header.items()} != {
        name: entry["shape"] for name, entry in theirs.items()
    }:
        return False
    names = sorted(header, key=lambda name: (math.prod(header[name]["shape"]), name))[:_COMPARED]
    with opened(path) as edited, opened(other) as source:
        equal = [torch.equal(edited.get_tensor(name), source.get_tensor(name)) for name in names]
    return 2 * sum(equal) >= len(equal)
