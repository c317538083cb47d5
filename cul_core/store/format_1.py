"""Read stored steps of history format 1, which names weights as diffusers does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..base.errors import CheckpointError, ModelError
from ..history.step_record import StepRecord
from ..history.unlearn_model import UnlearnModel
from ..models.load_diffusers import checkpoint_key_map
from ..models.source import FileSource

_FORMAT = "1"


def is_format_1(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata name format 1."""
    return metadata.get("cul_format") == _FORMAT


def former_hash(model: UnlearnModel) -> str | None:
    """The model's content hash in format 1; None if it has no name there for its source or for an edit."""
    if not model.edits:
        return model.content_hash
    if not isinstance(model.source, FileSource):
        return None
    try:
        names = {key: name for name, key in checkpoint_key_map(model.source.path).items()}
    except ModelError:  # without diffusers, whose names these are, such a step is trained again
        return None
    if not model.edits.keys() <= names.keys():
        return None
    return _hash(model, {names[key]: delta for key, delta in model.edits.items()})


def current(
    model: UnlearnModel, edits: Mapping[str, Tensor], record: StepRecord
) -> tuple[dict[str, Tensor], StepRecord]:
    """(edits by checkpoint key, record) of a format 1 step, in the current format.

    Args:
        model: the step's start.
        edits: diffusers' name -> delta, from the file.
        record: from the file.

    Raises:
        CheckpointError: the edits do not have the record's content hash, or one is no weight of the model.
    """
    if _hash(model, edits) != record.result:
        raise CheckpointError("its weights are not those it announces")
    keys = checkpoint_key_map(model.source.path)
    if unknown := sorted(set(edits) - set(keys)):
        raise CheckpointError(f"{unknown[0]!r} is no weight of {model.source.name!r}")
    renamed = {keys[name]: delta for name, delta in edits.items()}
    drift = {keys.get(name, name): values for name, values in record.drift.items()}
    result = UnlearnModel(model.source, model.family, renamed).content_hash
    return renamed, replace(record, drift=drift, parent=model.content_hash, result=result)


def _hash(model: UnlearnModel, edits: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(model.source.sha256.encode())
    for name in sorted(edits):
        digest.update(name.encode())
        digest.update(edits[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
