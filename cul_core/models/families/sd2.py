"""Stable Diffusion 2.x, with epsilon- or v-prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from ..family import Family, TextEncoder, predicting_velocity, register
from .sd1 import SD1
from .unet_layout import ROLES, UNET_PREFIX, recognize

_SPREAD = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def _velocity(family: Family, ends_in_noise: bool) -> Family:
    """The v-prediction variant of the family, for images of 768 px."""
    variant = predicting_velocity(family, ends_in_noise)
    return replace(variant, latent_shape=(4, 96, 96), image_size_px=768)


def _variant(family: Family, header: Mapping[str, dict], read: Callable[[str], Tensor]) -> Family:
    """The v-prediction variant if one tensor's standard deviation exceeds 0.09 (ComfyUI's rule)."""
    if _SPREAD in header and read(_SPREAD).float().std(correction=0) > 0.09:
        return family.velocity(family, False)
    return family


SD2 = register(
    Family(
        "sd2",
        "Stable Diffusion 2.x",
        signature=(320, 1024),
        latent_shape=(4, 64, 64),
        latent_scale=0.18215,
        image_size_px=512,
        sampling_batch=4,
        prefix=UNET_PREFIX,
        roles=ROLES,
        recognize=recognize,
        variant=_variant,
        velocity=_velocity,
        recipe=SD1.recipe,  # no other values are published
        text_encoders=(
            TextEncoder(
                "cond_stage_model.model.",
                is_open_clip=True,
                pads_with_zero=True,
                other_prefixes=("conditioner.embedders.0.model.",),
            ),
        ),
    )
)
