"""Which layers moved, and how far from the pretrained weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..files.safetensors_format import opened
from ..history.unlearn_model import UnlearnModel
from ..models.load_diffusers import checkpoint_key_map
from .charts import bars


@dataclass(frozen=True)
class Drift:
    """Frobenius norm of one tensor's edit, and its share of the pretrained tensor's own norm, in percent."""

    name: str
    distance: float
    percent: float


def drift_of(model: UnlearnModel) -> list[Drift]:
    """One entry per edited tensor, in the order of their names, numbers by value."""
    keys = checkpoint_key_map(model.source.path) if model.edits else {}
    found = []
    with opened(model.source.path) as file:
        for name in sorted(
            model.edits,
            key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)],
        ):
            distance, base = (
                model.edits[name].norm().item(),
                file.get_tensor(keys[name]).float().norm().item(),
            )
            found.append(Drift(name, distance, 100 * distance / base if base else float("inf")))
    return found


def total_drift(drifts: Sequence[Drift]) -> float:
    """Norm of all edits together."""
    return sum(drift.distance**2 for drift in drifts) ** 0.5


def drift_map(title: str, drifts: Sequence[Drift]) -> Image.Image:
    """A bar per tensor: its edit in percent of the pretrained tensor's norm."""
    return bars(title, [(short_name(drift.name), drift.percent) for drift in drifts], unit="%")


def short_name(name: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight` -> `down 0.1.0 attn2.to_k`."""
    name = re.sub(r"^(down|up|mid)_blocks?\.", r"\1 ", name.removesuffix(".weight"))
    return re.sub(r"(attentions|transformer_blocks|resnets)\.", "", name).replace(".attn", " attn")
