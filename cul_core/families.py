"""The model families we can edit: geometry, prediction type, network configs, and how to recognize them in a file.

The configs of a family are small JSON files in `configs/<name>/`, so that loading needs nothing but the checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError

_CONFIGS = Path(__file__).parent / "configs"
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        name: `mini` (later `sd1`, `sd2`, `sdxl`).
        display_name: what users see.
        prediction_type: `epsilon` or `v_prediction`.
        signature: (first width of the UNet, width of its text context), which tells families apart in a file.
        latent_shape: channels, height, width of the latents the model was trained on.
        latent_scale: model-space latents = autoencoder latents x this.
        image_size_px: side of the decoded picture.
    """

    name: str
    display_name: str
    prediction_type: str
    signature: tuple[int, int]
    latent_shape: tuple[int, int, int]
    latent_scale: float
    image_size_px: int

    def config(self, part: str) -> dict[str, Any]:
        """Constructor arguments of `unet`, `text_encoder` or `vae`."""
        return json.loads((_CONFIGS / self.name / f"{part}.json").read_text(encoding="utf-8"))

    @property
    def tokenizer_folder(self) -> Path:
        return _CONFIGS / self.name / "tokenizer"


MINI = Family("mini", "MiniCanvas", "epsilon", (64, 192), (4, 8, 8), 1.0, 64)
FAMILIES = {family.name: family for family in (MINI,)}


def family_of(shapes: dict[str, tuple[int, ...]], file_name: str) -> Family:
    """The family of a checkpoint, from the shapes of two of its tensors.

    Raises:
        ModelError: not a Stable Diffusion checkpoint layout, or an architecture without an entry here.
    """
    supported = ", ".join(family.display_name for family in FAMILIES.values())
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    context = next((shape for name, shape in sorted(shapes.items())
                    if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight")), None)  # fmt: skip
    if first is None or context is None:
        raise ModelError(f"{file_name!r} holds no Stable Diffusion UNet (no {UNET_PREFIX!r} tensors); "
                         f"choose a full checkpoint of a supported family: {supported}.")  # fmt: skip
    found = (first[0], context[1])
    for family in FAMILIES.values():
        if family.signature == found:
            return family
    raise ModelError(f"{file_name!r} has UNet width {found[0]} and text width {found[1]}, which is no supported "
                     f"architecture; choose a checkpoint of: {supported}.")  # fmt: skip
