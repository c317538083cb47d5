"""The model families we can edit: geometry, prediction type, network configs, and how to recognize them in a
file.

The configs of a family are small JSON files in `configs/<name>/`, so that loading needs nothing but the
checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_CONFIGS = Path(__file__).parent / "configs"
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class Recipe:
    """How a step trains on a family for which the presets' own values, which are tuned on MiniCanvas, do not
    fit.

    Args:
        iterations: optimizer updates of one step.
        batch_size: anchor latents per update.
        learning_rate: the optimizer's own, after any scaling by the batch.
        anchor_count: pictures by the pretrained model that a step trains on.
        anchor_steps: sampling steps of each.
        anchor_guidance: their classifier-free guidance scale.
    """

    iterations: int
    batch_size: int
    learning_rate: float
    anchor_count: int
    anchor_steps: int
    anchor_guidance: float


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders, and what of its output the UNet reads.

    Args:
        prefix: of its tensors in a checkpoint.
        config: name of its file of constructor arguments.
        is_open_clip: whether the checkpoint has OpenCLIP's layout of it.
        skips_last: its rows are what goes into the last layer, without a norm; otherwise what comes out of
            that, after the final one.
        pads_with_zero: whether token 0 follows the end of the text, instead of more ends.
        is_pooled: whether its projected vector of the whole prompt is read too.
    """

    prefix: str
    config: str = "text_encoder"
    is_open_clip: bool = False
    skips_last: bool = False
    pads_with_zero: bool = False
    is_pooled: bool = False


_CLIP = (TextEncoder(TEXT_PREFIX),)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        name: `mini`, `sd1`, `sd2`, `sdxl`.
        display_name: what users see.
        prediction_type: `epsilon` or `v_prediction`.
        signature: (first width of the UNet, width of its text context), which tells families apart in a file.
        latent_shape: channels, height, width of the latents the model was trained on.
        latent_scale: model-space latents = autoencoder latents x this.
        image_size_px: side of the decoded picture.
        sampling_batch: pictures per call of the UNet when sampling; guidance doubles it. Part of what fixes a
            picture's last bits.
        ships_tokenizer: whether the package holds the tokenizer; the caller gives its folder otherwise.
        has_decoder: whether the autoencoder, a tiny one, is loaded too; callers decode latents with their own
            otherwise.
        recipe: training values instead of the presets' own.
        closed_vocabulary: whether the text encoder knows no words but those that are one token.
        text_encoders: the UNet reads their rows side by side.
        ends_in_noise: whether the last timestep holds no picture at all (zero terminal SNR).
    """

    name: str
    display_name: str
    prediction_type: str
    signature: tuple[int, int]
    latent_shape: tuple[int, int, int]
    latent_scale: float
    image_size_px: int
    sampling_batch: int
    ships_tokenizer: bool
    has_decoder: bool
    recipe: Recipe | None = None
    closed_vocabulary: bool = False
    text_encoders: tuple[TextEncoder, ...] = _CLIP
    ends_in_noise: bool = False

    def config(self, part: str) -> dict[str, Any]:
        """Constructor arguments of `unet`, of a text encoder or of `vae`."""
        return json.loads((_CONFIGS / self.name / f"{part}.json").read_text(encoding="utf-8"))

    def has_config(self, part: str) -> bool:
        """Whether the package knows these arguments."""
        return (_CONFIGS / self.name / f"{part}.json").is_file()

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer in this package; None if it is not here."""
        return _CONFIGS / self.name / "tokenizer" if self.ships_tokenizer else None


MINI = Family(
    "mini",
    "MiniCanvas",
    prediction_type="epsilon",
    signature=(64, 192),
    latent_shape=(4, 8, 8),
    latent_scale=1.0,
    image_size_px=64,
    sampling_batch=16,
    ships_tokenizer=True,
    has_decoder=True,
    closed_vocabulary=True,
)
SD1 = Family(
    "sd1",
    "Stable Diffusion 1.x",
    prediction_type="epsilon",
    signature=(320, 768),
    latent_shape=(4, 64, 64),
    latent_scale=0.18215,
    image_size_px=512,
    sampling_batch=4,
    ships_tokenizer=False,
    has_decoder=False,
    # As in the paper's scripts for styles (arXiv 2511.07970: 2e-6 times a batch of 4) and Concept Ablation's
    # sampler; not tuned by us.
    recipe=Recipe(
        iterations=1000,
        batch_size=4,
        learning_rate=8e-6,
        anchor_count=200,
        anchor_steps=25,
        anchor_guidance=6.0,
    ),
)
SD2 = Family(
    "sd2",
    "Stable Diffusion 2.x",
    prediction_type="epsilon",
    signature=(320, 1024),
    latent_shape=(4, 64, 64),
    latent_scale=0.18215,
    # nobody published other values
    image_size_px=512,
    sampling_batch=4,
    ships_tokenizer=False,
    has_decoder=False,
    recipe=SD1.recipe,
    text_encoders=(TextEncoder("cond_stage_model.model.", is_open_clip=True, pads_with_zero=True),),
)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    prediction_type="epsilon",
    signature=(320, 2048),
    latent_shape=(4, 128, 128),
    latent_scale=0.13025,
    image_size_px=1024,
    sampling_batch=1,
    ships_tokenizer=False,
    has_decoder=False,
    # Nobody published values of Concept Ablation for it: those of Stable Diffusion 1.x at a batch of one
    # (2e-6 times that); not tuned.
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
FAMILIES = {family.name: family for family in (MINI, SD1, SD2, SDXL)}
V_PREDICTION = {
    "sd2": replace(
        SD2,
        display_name="Stable Diffusion 2.x (v-prediction)",
        prediction_type="v_prediction",
        latent_shape=(4, 96, 96),
        image_size_px=768,
    ),
    "sdxl": replace(SDXL, display_name="Stable Diffusion XL (v-prediction)", prediction_type="v_prediction"),
}
"""Of these families, what their networks that predict the velocity are like."""
