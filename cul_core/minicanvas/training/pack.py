"""Writes MiniCanvas as one checkpoint in Stable Diffusion's key layout, which `load_diffusers` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ...files.atomic_write import write_atomically
from ...models.families.unet_layout import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from ...models.load_diffusers import tiny_autoencoder_key, unet_key_map

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# ComfyUI's SD 1.5 latent format divides latents by this; its TAESD decoder multiplies them by it again
VAE_SCALE = 0.18215


def unet_checkpoint_key(name: str, layers_per_block: int) -> str:
    """Checkpoint key of a diffusers UNet parameter, for UNets with attention in every block."""
    module, leaf = name.rsplit(".", 1)
    if module in _TOP:
        return f"{UNET_PREFIX}{_TOP[module]}.{leaf}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        kind, index, rest = match.groups()
        place, slot = f"middle_block.{2 * int(index) + (kind == 'attentions')}", ""
    else:
        side, block, kind, index, rest = re.fullmatch(
            r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", module
        ).groups()
        entries = layers_per_block + 1
        within = layers_per_block if kind in ("downsamplers", "upsamplers") else int(index)
        number = int(block) * entries + within + (side == "down")
        place = f"{'input_blocks' if side == 'down' else 'output_blocks'}.{number}"
        slot = {"resnets": ".0", "attentions": ".1", "downsamplers": ".0", "upsamplers": ".2"}[kind]
        rest = {"downsamplers": "op", "upsamplers": "conv"}.get(kind, rest)
    return f"{UNET_PREFIX}{place}{slot}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}.{leaf}"


def checkpoint_tensors(
    unet: nn.Module, text: Mapping[str, Tensor], autoencoder: nn.Module, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of the checkpoint by key, in `dtype`; `autoencoder` is an `AutoencoderTiny`."""
    keys = {name: unet_checkpoint_key(name, unet.config.layers_per_block) for name in unet.state_dict()}
    if unet_key_map(list(keys.values()), unet.config) != keys:
        raise AssertionError("the key layout disagrees with the converter of diffusers")
    tensors = {keys[name]: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    tensors |= {
        f"{TEXT_PREFIX}text_model.{name.removeprefix('text_model.')}": tensor.to(dtype)
        for name, tensor in text.items()
        if not name.endswith("position_ids")
    }
    tensors |= {
        tiny_autoencoder_key(name): tensor.to(dtype) for name, tensor in autoencoder.state_dict().items()
    }
    scalars = {f"{VAE_PREFIX}vae_scale": VAE_SCALE, f"{VAE_PREFIX}vae_shift": 0.0}
    # fp32: rounding these to fp16 shifts colours
    return tensors | {key: torch.tensor(value) for key, value in scalars.items()}


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], figures: Mapping, extra: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose header holds the figures of the training run, and `extra` entries."""
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={"format": "pt", "minicanvas_figures": json.dumps(figures), **(extra or {})},
    )
    write_atomically(path, lambda file: file.write(data))
