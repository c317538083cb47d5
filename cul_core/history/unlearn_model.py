"""The central value, `UnlearnModel`: a source, edits away from its pretrained weights, and how they came
about."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..base.config import canonical_json
from ..models.family import Family
from ..models.source import Source
from .step_record import FORMAT, StepRecord


@dataclass(frozen=True)
class UnlearnModel:
    """W_k = W0 + edits, and the history that led there; a value: nothing ever changes it.

    Args:
        source: the pretrained weights W0.
        family: its architecture.
        edits: checkpoint key -> fp32 delta from W0 on the CPU, only for edited tensors.
        history: one record per step, oldest first. Before the record of a merge come those of all merged
            models, one model after the other; each says from which parent it began.
    """

    source: Source
    family: Family
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[StepRecord, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "edits", MappingProxyType(dict(self.edits)))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the source's hash and the edits: two models with the same of both are the same
        model."""
        digest = hashlib.sha256(self.source.sha256.encode())
        for name in sorted(self.edits):
            digest.update(name.encode())
            digest.update(self.edits[name].contiguous().flatten().numpy())
        return digest.hexdigest()

    @property
    def forgotten(self) -> tuple[dict[str, Any], ...]:
        """JSON of every concept forgotten so far, oldest first."""
        return tuple(concept for record in self.history for concept in record.request["concepts"])

    @property
    def requests(self) -> int:
        """How many requests the model has been through; merging is none."""
        return sum(not record.is_merge for record in self.history)

    def with_step(self, edits: Mapping[str, Tensor], record: StepRecord) -> UnlearnModel:
        return replace(self, edits=edits, history=(*self.history, record))

    def with_history(self, history: tuple[StepRecord, ...]) -> UnlearnModel:
        """The same weights, come about in another way; their hash is not computed again."""
        model = replace(self, history=history)
        if "content_hash" in vars(self):
            vars(model)["content_hash"] = self.content_hash
        return model

    def nbytes(self) -> int:
        """Bytes held by the edits."""
        return sum(delta.numel() * delta.element_size() for delta in self.edits.values())

    def metadata(self) -> dict[str, str]:
        """The header entries by which a written file explains itself. Holds no path, only the source's file
        name."""
        return {
            "cul_format": FORMAT,
            "cul_source": canonical_json(
                {"name": self.source.name, "size": self.source.size, "sha256": self.source.sha256}
            ),
            "cul_history": canonical_json([asdict(record) for record in self.history]),
        }


def weights_of(model: UnlearnModel, pretrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp32 W_k for every name in `pretrained` (its W0 tensors); where nothing is edited, these very tensors
    if they are fp32."""
    weights = {}
    for name, base in pretrained.items():
        weight = base.detach().float()
        weights[name] = weight + model.edits[name].to(weight.device) if name in model.edits else weight
    return weights
