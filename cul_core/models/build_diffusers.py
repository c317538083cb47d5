"""Networks of diffusers and transformers without weights, on the meta device."""

from __future__ import annotations

import logging
import re
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from ..base.errors import ModelError
from .family import Family, TextEncoder
from .frozen_layers import replace_frozen_layers

logger = logging.getLogger(__name__)
_OLDEST_DIFFUSERS, _NEWEST_DIFFUSERS = (0, 33), (0, 42)
"""The oldest and the newest version (major, minor) of diffusers that the tests have run with."""
_WANTED_DIFFUSERS = "diffusers>=0.33,<0.36"
"""Requirement to install where diffusers is missing.

Later versions bound huggingface_hub, so that pip may change a host's packages. pyproject.toml states the
same requirement. ComfyUI needs none: there the nodes use the host's own networks.
"""


def require_diffusers() -> None:
    """Check that diffusers is installed; a version newer than the tested ones gives a warning.

    Raises:
        ModelError: diffusers is missing or too old; the message has the command that installs it in this
            Python.
    """
    try:
        installed = version("diffusers")
    except PackageNotFoundError:
        installed = None
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed or "")[:2])
    if installed is None or numbers < _OLDEST_DIFFUSERS:
        state = "is not installed" if installed is None else f"has version {installed or repr(installed)}"
        python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
        raise ModelError(
            f"The package diffusers {state}, where {_text_of(_OLDEST_DIFFUSERS)} or later is needed; run: "
            f'{python} -m pip install "{_WANTED_DIFFUSERS}"'
        )
    if numbers > _NEWEST_DIFFUSERS:
        _warn_of_newer(installed)


@lru_cache
def _warn_of_newer(installed: str) -> None:
    """Log, once for each version, that it is not tested."""
    logger.warning(
        "diffusers %s is newer than %s, the last version that was tested; it is used anyway",
        installed,
        _text_of(_NEWEST_DIFFUSERS),
    )


def _text_of(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def build_unet(family: Family) -> nn.Module:
    """The family's UNet without weights, on the meta device.

    Raises:
        ModelError: the family has no UNet of diffusers; or see `require_diffusers`.
    """
    if not family.has_config("unet"):
        raise ModelError(
            f"{family.display_name} runs only in ComfyUI, which has its network; use the nodes there."
        )
    require_diffusers()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(family.config("unet"))
    return unet if family.is_small else replace_frozen_layers(unet)


def build_text_encoder(family: Family, kind: TextEncoder) -> nn.Module:
    """One of the family's text encoders, without weights, on the meta device; position ids are filled."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**family.config(kind.config))
    with torch.device("meta"):
        encoder = (CLIPTextModelWithProjection if kind.is_pooled else CLIPTextModel)(config)
    for module in encoder.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):  # no checkpoint has them
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    return encoder if family.is_small else replace_frozen_layers(encoder)
