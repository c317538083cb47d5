"""Anchor pictures scaled, shifted and mirrored: a finite pool of versions, encoded once per step (Kumari et
al., authors' code)."""

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
    """Where a square picture lies in a frame of `frame_px`: its side, and its corner there, negative where
    the frame cuts it off."""

    frame_px: int
    size_px: int
    top_px: int = 0
    left_px: int = 0

    @classmethod
    def draw(cls, frame_px: int, generator: torch.Generator) -> Placement:
        """Two times of three between a third of the frame and all of it, else 1.2 to 1.4 times the frame;
        anywhere that it fits."""
        is_small = torch.rand((), generator=generator) < 0.66
        low, high = (-(-frame_px // 3), frame_px) if is_small else (-(-frame_px * 6 // 5), frame_px * 7 // 5)
        size = int(torch.randint(low, high + 1, (), generator=generator))
        room = sorted((0, frame_px - size))
        top, left = torch.randint(room[0], room[1] + 1, (2,), generator=generator).tolist()
        return cls(frame_px, size, top, left)

    def prefix(self, generator: torch.Generator) -> str:
        """What a caption begins with to say the scale; nothing where it is about the frame's."""
        words = (
            _FAR if self.size_px < 0.6 * self.frame_px else _NEAR if self.size_px > self.frame_px else ("",)
        )
        return words[int(torch.randint(len(words), (), generator=generator))]

    def apply(self, pictures: Tensor) -> Tensor:
        """(b, 3, frame, frame) pictures in [0, 1] as they look when placed so, on grey."""
        size, end = (self.size_px, self.size_px), self.frame_px - self.size_px
        scaled = functional.interpolate(pictures, size, mode="bilinear", antialias=True)
        return functional.pad(
            scaled, (self.left_px, end - self.left_px, self.top_px, end - self.top_px), value=_GREY
        )

    def mask(self, cells: int, margin: int = 0) -> Tensor:
        """(cells, cells), 1 for latent cells that lie wholly in the picture, but for `margin` more at each
        side where it has sides."""
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
    """The pictures that updates draw from.

    Args:
        anchors: number of the anchor that each shows.
        prefixes: what the captions of each begin with; empty for a picture as it is.
        latents: (n, c, h, w).
        masks: (n, h, w), 1 where a latent cell counts in the loss; None where all do.
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
    """`versions` placements of every anchor in place of its own latents, or these if there are none; all also
    mirrored if `flip`.

    Without either, nothing is decoded or encoded.

    Args:
        network: the model whose autoencoder decodes and encodes the pictures.
        latents: (n, c, h, w) of the anchors.
        versions: placements of each.
        flip: whether every picture is there in both orientations.
        border: whether the rim does not count, round(h / 64) latent cells of each side: 1 of Stable
            Diffusion's 64, 0 of 8.
        generator: purpose and number of an anchor -> a CPU generator.
        check: called for each anchor; may raise to stop.

    Raises:
        ModelError: there is no autoencoder.
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
            picture = network.decode(latent[None])
            places = [Placement.draw(frame, random) for _ in range(versions)] or [whole]
            placed = [
                (place.apply(picture), place.mask(cells, margin), place.prefix(random)) for place in places
            ]
            if flip:
                placed += [(shown.flip(-1), mask.flip(-1), prefix) for shown, mask, prefix in placed]
            for index, (shown, mask, prefix) in enumerate(placed):
                is_the_anchor = not versions and index == 0
                encoded.append(latent[None] if is_the_anchor else network.encode_images(shown, random))
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
