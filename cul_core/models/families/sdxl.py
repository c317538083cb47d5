"""Stable Diffusion XL, with epsilon- or v-prediction."""

from ..family import Family, Recipe, TextEncoder, register
from .unet_layout import ROLES, UNET_PREFIX, recognize

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
