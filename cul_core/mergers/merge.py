"""Merge finished models of one source into one: `merge(models, config)`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import torch

from ..base.config import Config, stable_hash
from ..base.errors import ModelError, TrainingError
from ..history.step_record import StepRecord, library_versions
from ..history.unlearn_model import UnlearnModel
from . import MERGERS


def merge(
    models: Sequence[UnlearnModel],
    config: Config,
    on_tensor: Callable[[int, int], None] = lambda done, count: None,
) -> UnlearnModel:
    """The merged model: W0 plus the merged edits of `models`, which are not changed.

    Its history holds the records of all models, in their order and each once, then the merge's own record.

    Args:
        models: edited from the same source.
        config: of a registered merger.
        on_tensor: called with (tensors merged, their number) after each tensor; may raise to cancel.

    Raises:
        ModelError: there are no models, or they have different sources.
        ConfigError: the config belongs to no merger, or does not fit the number of models.
        TrainingError: an edit, or a merged edit, is not finite.
    """
    begun = time.monotonic()
    merger = MERGERS.of(config).cls(config)
    if not models:
        raise ModelError("There is no model to merge; give at least one.")
    first = models[0]
    for model in models:
        if model.source.identity != first.source.identity:
            raise ModelError(
                f"The models to merge were made from different files, {first.source.name!r} and "
                f"{model.source.name!r}; make all of them from the same one."
            )
        for name, delta in model.edits.items():
            if not torch.isfinite(delta).all():
                raise TrainingError(
                    f"The edit of {name!r} in model {model.content_hash[:12]} holds values that are not "
                    "finite; leave that model out."
                )
    count = len({name for model in models for name in model.edits})
    edits, drift = {}, {}
    for done, (name, delta) in enumerate(merger.merge([model.edits for model in models]), 1):
        if not torch.isfinite(delta).all():
            raise TrainingError(
                f"The merged edit of {name!r} holds values that are not finite; lower the strength or the "
                "weights."
            )
        if delta.any():
            edits[name], distance = delta, delta.norm().item()
            drift[name] = [distance, distance]
        on_tensor(done, count)
    history = {stable_hash(asdict(record)): record for model in models for record in model.history}
    merged = UnlearnModel(first.source, first.family, edits)
    record = StepRecord(
        request={
            "concepts": [],
            "merge": config.to_json(),
            "models": [model.content_hash for model in models],
            "last_steps": [model.history[-1].result if model.history else None for model in models],
        },
        losses={},
        drift=drift,
        parent=UnlearnModel(first.source, first.family).content_hash,
        result=merged.content_hash,
        seconds=round(time.monotonic() - begun, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )
    return merged.with_history((*history.values(), record))
