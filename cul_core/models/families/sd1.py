"""Stable Diffusion 1.x."""

from ..family import Family, Recipe, TextEncoder, register
from .unet_layout import ROLES, TEXT_PREFIX, UNET_PREFIX, recognize

SD1 = register(
    Family(
        "sd1",
        "Stable Diffusion 1.x",
        signature=(320, 768),
        latent_shape=(4, 64, 64),
        latent_scale=0.18215,
        image_size_px=512,
        sampling_batch=4,
        prefix=UNET_PREFIX,
        roles=ROLES,
        recognize=recognize,
        text_encoders=(TextEncoder(TEXT_PREFIX),),
        # Rate and batch of CUIG's scripts for styles (arXiv 2511.07970: 2e-6 times a batch of 4), and Concept
        # Ablation's sampler; not tuned by us.
        recipe=Recipe(
            iterations=1000,
            batch_size=4,
            learning_rate=8e-6,
            anchor_count=200,
            anchor_steps=25,
            anchor_guidance=6.0,
        ),
    )
)
