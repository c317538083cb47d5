"""Augmentation of anchor images: a pool of scaled, shifted and mirrored versions, encoded once per step.

The scales and caption prefixes are those of Concept Ablation's code (Kumari et al., ICCV 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..models.network import Network

_FAR, _NEAR = ("A far away ", "A very small "), ("A zoomed in ", "A close up ")
_GREY = 0.5


@dataclass(frozen=True)
class Placement:
    """Scale and position of a square image in a square frame.

    Args:
        frame_px: side of the frame.
        size_px: side of the scaled image.
        top_px: row of the image's top edge; negative if the frame crops it.
        left_px: column of the image's left edge; negative if the frame crops it.
    """

    frame_px: int
    size_px: int
    top_px: int = 0
    left_px: int = 0

    @classmethod
    def draw(cls, frame_px: int, generator: torch.Generator) -> Placement:
        """A random placement: the size is 1/3 to 1 of the frame with probability 0.66, else 1.2 to 1.4 of it.

        The position is uniform; a smaller image lies inside the frame, and a larger one covers it.
        """
        is_small = torch.rand((), generator=generator) < 0.66
        low, high = (-(-frame_px // 3), frame_px) if is_small else (-(-frame_px * 6 // 5), frame_px * 7 // 5)
        size = int(torch.randint(low, high + 1, (), generator=generator))
        room = sorted((0, frame_px - size))
        top, left = torch.randint(room[0], room[1] + 1, (2,), generator=generator).tolist()
        return cls(frame_px, size, top, left)

    def prefix(self, generator: torch.Generator) -> str:
        """A random caption prefix that describes the scale; empty for 0.6 to 1 of the frame."""
        words = (
            _FAR if self.size_px < 0.6 * self.frame_px else _NEAR if self.size_px > self.frame_px else ("",)
        )
        return words[int(torch.randint(len(words), (), generator=generator))]

    def apply(self, images: Tensor) -> Tensor:
        """Placed images on grey, of the shape and range of `images`: (b, 3, frame, frame) in [0, 1]."""
        size, end = (self.size_px, self.size_px), self.frame_px - self.size_px
        scaled = functional.interpolate(images, size, mode="bilinear", antialias=True)
        return functional.pad(
            scaled, (self.left_px, end - self.left_px, self.top_px, end - self.top_px), value=_GREY
        )

    def mask(self, cells: int, margin: int = 0) -> Tensor:
        """Latent mask (cells, cells): 1 for cells entirely inside the image, except a `margin` at its edges.

        An image that covers the frame has no visible edges, so no margin applies.
        """
        cell, margin = self.frame_px // cells, margin if self.size_px <= self.frame_px else 0
        rows, columns = (
            slice(
                -(-max(begin, 0) // cell) + margin, min(begin + self.size_px, self.frame_px) // cell - margin
            )
            for begin in (self.top_px, self.left_px)
        )
        mask = torch.zeros(cells, cells)
        mask[rows, columns] = 1
        return mask


@dataclass(frozen=True)
class AnchorPool:
    """Pool of anchor images that updates draw from.

    Args:
        anchors: index of each image's anchor.
        prefixes: caption prefix of each image; empty if it is not scaled.
        latents: (n, c, h, w).
        masks: loss masks (n, h, w), 1 where a latent cell counts; None if all cells count.
    """

    anchors: Sequence[int]
    prefixes: Sequence[str]
    latents: Tensor
    masks: Tensor | None = None


def anchor_pool(
    network: Network,
    latents: Tensor,
    *,
    versions: int,
    flip: bool,
    border: bool,
    generator: Callable[..., torch.Generator],
    check: Callable[[], None] = lambda: None,
) -> AnchorPool:
    """Pool of augmented anchor images.

    Without `versions` and `flip` the pool holds the anchors' own latents, and nothing is decoded or encoded.

    Args:
        network: model whose autoencoder decodes and encodes the images.
        latents: anchor latents (n, c, h, w).
        versions: random placements of each anchor, in place of its own latents; 0 keeps these.
        flip: whether the pool also has the mirror image of every image.
        border: whether the masks exclude the edge, round(h / 64) latent cells on each side: 1 for a side of
            64 (Stable Diffusion 1.x), 0 for 8.
        generator: (purpose, index of an anchor) -> CPU generator.
        check: called for each anchor; may raise to stop.

    Raises:
        ModelError: the network has no autoencoder.
    """
    cells, frame = latents.shape[-1], network.family.image_size_px
    margin = round(cells / 64) if border else 0
    whole = Placement(frame, frame)
    if not (versions or flip):
        masks = whole.mask(cells, margin).expand(len(latents), -1, -1).to(latents.device) if margin else None
        return AnchorPool(range(len(latents)), [""] * len(latents), latents, masks)
    prefixes, encoded, masks = [], [], []
    with network.with_autoencoder():
        for number, latent in enumerate(latents):
            check()
            random = generator("augmentation", number)
            image = network.decode(latent[None])
            places = [Placement.draw(frame, random) for _ in range(versions)] or [whole]
            placed = [
                (place.apply(image), place.mask(cells, margin), place.prefix(random)) for place in places
            ]
            if flip:
                placed += [(version.flip(-1), mask.flip(-1), prefix) for version, mask, prefix in placed]
            for index, (version, mask, prefix) in enumerate(placed):
                is_the_anchor = not versions and index == 0
                encoded.append(latent[None] if is_the_anchor else network.encode_images(version, random))
                masks.append(mask)
                prefixes.append(prefix)
    each = len(placed)
    anchors = [number for number in range(len(latents)) for _ in range(each)]
    return AnchorPool(
        anchors,
        prefixes,
        torch.cat(encoded),
        torch.stack(masks).to(latents.device) if versions or margin else None,
    )
