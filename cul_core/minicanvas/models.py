"""MiniCanvas' own networks: the autoencoder as it is trained, and the classifier of images.

UNet and text encoder are plain diffusers and transformers classes, configured in
`cul_core/minicanvas/config/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

_HERE = Path(__file__).parent


def checkpoint_path(world: str) -> Path:
    """The shipped checkpoint of the `small` or the `large` world."""
    return _HERE / "checkpoints" / f"minicanvas{_SUFFIXES[world]}.safetensors"


def classifier_path(world: str) -> Path:
    """The shipped classifier of the `small` or the `large` world."""
    return _HERE / "weights" / f"classifier{_SUFFIXES[world]}.safetensors"


_SUFFIXES = {"small": "", "large": "_large"}
CHECKPOINT_PATH, CLASSIFIER_PATH = checkpoint_path("small"), classifier_path("small")

AUTOENCODER_WIDTHS = (24, 32, 64, 64)
"""Trained channels per level, 64x64 pixels first; TAESD's shape has 64, the others are zero."""
_ENCODER_BLOCKS = (0, 1, 3, 3)  # trained blocks per level; TAESD has (1, 3, 3, 3) in encoder and decoder
_DECODER_BLOCKS = (1, 2, 3, 3)


class ResidualBlock(nn.Module):
    """TAESD's block relu(conv(x) + x); with a zero last convolution, the identity on non-negative input."""

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
    """TAESD with fewer channels at high resolution: a third of the cost, exactly embeddable into TAESD.

    Images and reconstructions are (b, 3, 64, 64) in [0, 1], latents (b, 4, 8, 8) near unit variance.
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
        """A `diffusers.AutoencoderTiny` of the same function; missing channels and blocks are zero in it.

        A block whose convolutions are all zero is relu(x). It replaces a plain ReLU. After a trained block it
        is the identity, because its input is non-negative already.
        """
        from diffusers import AutoencoderTiny

        wide = AutoencoderTiny()
        for parameter in wide.parameters():
            parameter.data.zero_()
        for value, part in _shared_values(self, wide):
            part.copy_(value)
        return wide.eval()

    @classmethod
    def narrowed(cls, wide: nn.Module) -> NarrowAutoencoder:
        """The narrow autoencoder that `widened` made this `diffusers.AutoencoderTiny` of."""
        narrow = cls()
        for value, part in _shared_values(narrow, wide):
            value.copy_(part)
        return narrow


def _paired(narrow: nn.Sequential, wide: nn.Sequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(layer, its counterpart in AutoencoderTiny) for every trained layer.

    Blocks, and the ReLU that replaces one, pair up within a level; plain layers pair up one to one.
    """
    waiting = [layer for layer in narrow if not isinstance(layer, nn.Upsample)]
    for layer in wide:
        is_block = hasattr(layer, "fuse")
        if isinstance(layer, nn.Upsample) or (
            is_block and not isinstance(waiting[0], ResidualBlock | nn.ReLU)
        ):
            continue
        yield waiting.pop(0), layer
    if waiting:
        raise AssertionError(f"{len(waiting)} trained layers have no counterpart in AutoencoderTiny")


def _shared_values(narrow: NarrowAutoencoder, wide: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(narrow value, the part of AutoencoderTiny's value that equals it) for every weight."""
    for part in ("encoder", "decoder"):
        for source, target in _paired(getattr(narrow, part), getattr(wide, part).layers):
            for name, value in source.state_dict().items():
                yield value, target.get_parameter(name).data[tuple(slice(size) for size in value.shape)]


def load_autoencoder(path: Path) -> NarrowAutoencoder:
    """The trained autoencoder, frozen."""
    model = NarrowAutoencoder()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Classifier(nn.Module):
    """(style logits (b, styles + 1), object logits (b, objects + 1)) of images (b, 3, 64, 64) in [0, 1].

    The last class of each head means "none of these".

    Args:
        styles: number of styles.
        objects: number of objects, with the people.
        tells_pairs: whether there is a third head, for the right one of two objects.
    """

    def __init__(self, styles: int, objects: int, tells_pairs: bool = False):
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
        self.second = nn.Linear(128 * 16, objects + 1) if tells_pairs else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.features(images * 2 - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        heads = [head for head in (self.object, self.second) if head is not None]
        return self.style(pooled), *(head(features.flatten(1)) for head in heads)
