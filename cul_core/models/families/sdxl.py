"""Stable Diffusion XL, with epsilon- or v-prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from ..discrete_process import DiscreteProcess
from ..family import Family, Recipe, TextEncoder, register
from .unet_layout import ROLES, UNET_PREFIX, recognize


def predicting_velocity(family: Family, ends_in_noise: bool = False) -> Family:
    """The v-prediction variant of the family; with `ends_in_noise` its schedule has zero terminal SNR."""
    return replace(
        family,
        display_name="Stable Diffusion XL (v-prediction)",
        process=DiscreteProcess("v_prediction", ends_in_noise),
    )


def _variant(family: Family, header: Mapping[str, dict], read: Callable[[str], Tensor]) -> Family:
    """The v-prediction variant if the checkpoint has a marker tensor `v_pred`; `ztsnr` marks zero SNR."""
    return predicting_velocity(family, "ztsnr" in header) if "v_pred" in header else family


SDXL = register(
    Family(
        "sdxl",
        "Stable Diffusion XL",
        signature=(320, 2048),
        latent_shape=(4, 128, 128),
        latent_scale=0.13025,
        image_size_px=1024,
        sampling_batch=1,
        prefix=UNET_PREFIX,
        roles=ROLES,
        recognize=recognize,
        variant=_variant,
        # No values of Concept Ablation are published for XL: these are Stable Diffusion 1.x's at a batch of 1
        # (2e-6 times the batch); not tuned by us.
        recipe=Recipe(
            iterations=1000,
            batch_size=1,
            learning_rate=2e-6,
            anchor_count=200,
            anchor_steps=25,
            anchor_guidance=6.0,
        ),
        text_encoders=(
            TextEncoder("conditioner.embedders.0.transformer.", skips_last=True),
            TextEncoder(
                "conditioner.embedders.1.model.",
                "text_encoder_2",
                is_open_clip=True,
                skips_last=True,
                pads_with_zero=True,
                is_pooled=True,
            ),
        ),
    )
)
