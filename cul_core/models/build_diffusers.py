"""Empty networks of diffusers and transformers, on the meta device."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from ..base.errors import ModelError
from .family import Family, TextEncoder
from .frozen_layers import replace_frozen_layers

# tested from the first up to, not including, the second; pyproject.toml says the same
_DIFFUSERS = ((0, 33), (0, 40))


def require_diffusers() -> None:
    """Raises ModelError with the command that mends it when diffusers is missing or of an untested
    version."""
    try:
        found = version("diffusers")
    except PackageNotFoundError:
        found = None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found or "")[:2])
    if found is None or not _DIFFUSERS[0] <= numbers < _DIFFUSERS[1]:
        state = "is not installed" if found is None else f"has version {found}"
        bounds = ">={}.{},<{}.{}".format(*_DIFFUSERS[0], *_DIFFUSERS[1])
        raise ModelError(
            f"The package diffusers {state}, where {bounds} is needed; run in this Python environment: "
            f'pip install "diffusers{bounds}"'
        )


def build_unet(family: Family) -> nn.Module:
    """The family's UNet without values.

    Raises:
        ModelError: see `require_diffusers`.
    """
    require_diffusers()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(family.config("unet"))
    return unet if family.is_small else replace_frozen_layers(unet)


def build_text_encoder(family: Family, kind: TextEncoder) -> nn.Module:
    """One of the family's text encoders, without values but for the ids of positions."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**family.config(kind.config))
    with torch.device("meta"):
        encoder = (CLIPTextModelWithProjection if kind.is_pooled else CLIPTextModel)(config)
    for module in encoder.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):  # in no checkpoint
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    return encoder if family.is_small else replace_frozen_layers(encoder)
