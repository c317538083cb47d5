"""Drift: how far each layer moved from the pretrained weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..history.unlearn_model import UnlearnModel
from .charts import bars


@dataclass(frozen=True)
class Drift:
    """Frobenius norm of one tensor's edit, and the norm in percent of the pretrained tensor's own norm."""

    name: str
    distance: float
    percent: float


def drift_of(model: UnlearnModel) -> list[Drift]:
    """One entry per edited tensor, sorted by key, numbers in a key by value."""

    def by_number(key: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]

    drifts = []
    for key, base in model.source.read(sorted(model.edits, key=by_number)):
        distance, size = model.edits[key].norm().item(), base.float().norm().item()
        drifts.append(Drift(key, distance, 100 * distance / size if size else float("inf")))
    return drifts


def total_drift(drifts: Sequence[Drift]) -> float:
    """Frobenius norm of all edits together."""
    return sum(drift.distance**2 for drift in drifts) ** 0.5


def drift_map(title: str, drifts: Sequence[Drift]) -> Image.Image:
    """A bar chart of every tensor's drift in percent."""
    return bars(title, [(short_name(drift.name), drift.percent) for drift in drifts], unit="%")


def short_name(key: str) -> str:
    """`model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight` -> `in 1.1.0
    attn2.to_k`."""
    key = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
    key = re.sub(r"^(in|middle|out)(?:put)?_blocks?\.", r"\1 ", key)
    return key.replace("transformer_blocks.", "").replace(".attn", " attn")
