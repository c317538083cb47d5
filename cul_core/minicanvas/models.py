"""MiniCanvas' own networks: the autoencoder as it is trained, and the classifier that scores pictures.

UNet and text encoder are plain diffusers and transformers classes, configured in
`cul_core/models/configs/mini/`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

CHECKPOINT_PATH = Path(__file__).parent / "checkpoints" / "minicanvas.safetensors"
CLASSIFIER_PATH = Path(__file__).parent / "weights" / "classifier.safetensors"

AUTOENCODER_WIDTHS = (24, 32, 64, 64)
"""Channels per level that are trained, 64x64 pixels first; the rest of the 64 channels of TAESD's shape are
zero."""
_ENCODER_BLOCKS = (0, 1, 3, 3)  # trained blocks per level; TAESD's shape has (1, 3, 3, 3) and (1, 3, 3, 3)
_DECODER_BLOCKS = (1, 2, 3, 3)


class ResidualBlock(nn.Module):
    """TAESD's block, relu(conv(x) + x); an all-zero last convolution makes it the identity on its
    (non-negative) input."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x) + x)


class NarrowAutoencoder(nn.Module):
    """TAESD with fewer channels where pixels are many: a third of the cost, and exactly embeddable into
    TAESD's shape.

    Pictures and reconstructions are (b, 3, 64, 64) in [0, 1], latents (b, 4, 8, 8) near unit variance.
    """

    def __init__(self):
        super().__init__()
        w = AUTOENCODER_WIDTHS
        encoder: list[nn.Module] = [nn.Conv2d(3, w[0], 3, padding=1)]
        for level in range(4):
            if level:
                encoder.append(nn.Conv2d(w[level - 1], w[level], 3, stride=2, padding=1, bias=False))
            encoder += [ResidualBlock(w[level]) for _ in range(_ENCODER_BLOCKS[level])] or [nn.ReLU()]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(w[3], 4, 3, padding=1))
        decoder: list[nn.Module] = [nn.Conv2d(4, w[3], 3, padding=1), nn.ReLU()]
        for level in (3, 2, 1, 0):
            decoder += [ResidualBlock(w[level]) for _ in range(_DECODER_BLOCKS[level])]
            if level:
                decoder += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(w[level], w[level - 1], 3, padding=1, bias=False),
                ]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(w[0], 3, 3, padding=1))

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(3 * (latents / 3).tanh())

    def widened(self) -> nn.Module:
        """A `diffusers.AutoencoderTiny` that computes the same function, the missing channels and blocks
        being zero.

        A block whose convolutions are all zero is relu(x); it stands for the plain ReLU and, after a trained
        block, for nothing, because what it gets is non-negative already.
        """
        from diffusers import AutoencoderTiny

        wide = AutoencoderTiny()
        for parameter in wide.parameters():
            parameter.data.zero_()
        _embed(self.encoder, wide.encoder.layers)
        _embed(self.decoder, wide.decoder.layers)
        return wide.eval()


def _embed(narrow: nn.Sequential, wide: nn.Sequential) -> None:
    """Copy layer by layer; blocks (and the ReLU that stands for one) pair up within a level, plain layers one
    to one."""
    waiting = [layer for layer in narrow if not isinstance(layer, nn.Upsample)]
    for layer in wide:
        is_block = hasattr(layer, "fuse")
        if isinstance(layer, nn.Upsample) or (
            is_block and not isinstance(waiting[0], ResidualBlock | nn.ReLU)
        ):
            continue
        source = waiting.pop(0)
        for name, value in source.state_dict().items():
            target = layer.get_parameter(name).data
            target[tuple(slice(size) for size in value.shape)] = value
    if waiting:
        raise AssertionError(f"{len(waiting)} trained layers found no place in the wide shape")


def load_autoencoder(path: Path) -> NarrowAutoencoder:
    """The autoencoder as it was trained, frozen."""
    model = NarrowAutoencoder()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Classifier(nn.Module):
    """Style and object of (b, 3, 64, 64) pictures in [0, 1]; the last class of each head rejects.

    Returns (style logits, object logits): (b, styles + 1), (b, objects + 1).
    """

    def __init__(self, styles: int, objects: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.style = nn.Linear(128 * 2, styles + 1)
        self.object = nn.Linear(128 * 16, objects + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images * 2 - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return self.style(pooled), self.object(features.flatten(1))
