"""`UnlearnModel`, the central immutable value: pretrained weights, edits of them, and their history."""

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
    """An immutable model W_k = W0 + edits after k steps, with their history.

    Args:
        source: pretrained weights W0.
        family: architecture of the model.
        edits: checkpoint key -> fp32 delta from W0 on the CPU, only for edited tensors.
        history: one record per step, oldest first. A merge's record follows the records of all merged models,
            one model after the other; each record's `parent` tells where it began.
    """

    source: Source
    family: Family
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[StepRecord, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "edits", MappingProxyType(dict(self.edits)))

    @cached_property
    def content_hash(self) -> str:
        """Content hash: SHA-256 over the source's identity and the edits, which identifies the weights."""
        digest = hashlib.sha256(self.source.identity.encode())
        for name in sorted(self.edits):
            digest.update(name.encode())
            digest.update(self.edits[name].contiguous().flatten().numpy())
        return digest.hexdigest()

    @property
    def forgotten(self) -> tuple[dict[str, Any], ...]:
        """JSON of all concepts forgotten so far, oldest first; steps that changed nothing forgot none."""
        return tuple(
            concept for record in self.history if record.has_changed for concept in record.request["concepts"]
        )

    @property
    def requests(self) -> int:
        """Number of unlearning requests in the history; merges do not count."""
        return sum(not record.is_merge for record in self.history)

    def with_step(self, edits: Mapping[str, Tensor], record: StepRecord) -> UnlearnModel:
        """The model after one more step: new edits, and the history with its record appended."""
        return replace(self, edits=edits, history=(*self.history, record))

    def with_history(self, history: tuple[StepRecord, ...]) -> UnlearnModel:
        """The same weights with another history; a computed content hash is carried over."""
        model = replace(self, history=history)
        if "content_hash" in vars(self):
            vars(model)["content_hash"] = self.content_hash
        return model

    def nbytes(self) -> int:
        """Bytes of the edits."""
        return sum(delta.numel() * delta.element_size() for delta in self.edits.values())

    def metadata(self) -> dict[str, str]:
        """Header entries of a written file: format, source and history; the source has no folder."""
        prediction = getattr(self.source, "prediction", "auto")
        chosen = {} if prediction == "auto" else {"cul_prediction": prediction}
        return chosen | {
            "cul_format": FORMAT,
            "cul_source": canonical_json(
                {"name": self.source.name, "size": self.source.size, "sha256": self.source.sha256}
            ),
            "cul_history": canonical_json([asdict(record) for record in self.history]),
        }


def weights_of(model: UnlearnModel, pretrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights W_k in fp32 by checkpoint key; unedited weights that are already fp32 are not copied.

    Args:
        model: the model.
        pretrained: checkpoint key -> W0, of the weights that are wanted.
    """
    weights = {}
    for name, base in pretrained.items():
        weight = base.detach().float()
        weights[name] = weight + model.edits[name].to(weight.device) if name in model.edits else weight
    return weights
