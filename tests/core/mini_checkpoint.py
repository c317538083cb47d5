"""Checkpoints of MiniCanvas' shape."""

import torch

from cul_core.minicanvas import models
from cul_core.minicanvas.family import MINI
from cul_core.minicanvas.training.pack import checkpoint_tensors, write_weights


def write_random_checkpoint(path, dtype=torch.float16, seed=0):
    """A checkpoint of MiniCanvas' shape with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**MINI.config("unet"))
    text = CLIPTextModel(CLIPTextConfig(**MINI.config("text_encoder")))
    write_weights(
        path, checkpoint_tensors(unet, text.state_dict(), models.NarrowAutoencoder().widened(), dtype), {}
    )
    return path
