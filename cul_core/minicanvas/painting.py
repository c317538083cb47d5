"""Drawing for MiniCanvas: soft masks of placed shapes, and helpers that fill and mix pictures (64, 64, 3)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .shapes import Shape

SIZE = 64
_SUPERSAMPLE = 3
Y, X = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5) / SIZE
"""Coordinates of the pixels' centres in [0, 1], (64, 64) each."""


class Place(NamedTuple):
    """Where a shape is drawn: its size, and the horizontal offset of its centre, of the picture's side."""

    size: float = 1.0
    offset: float = 0.0


CENTRE = (Place(),)


class Masks:
    """Soft masks of placed shapes, each (64, 64) in [0, 1]: body, detail, edge, and the blurred body."""

    def __init__(self, shapes: Sequence[Shape], rng: random.Random, places: Sequence[Place] = CENTRE):
        big = SIZE * _SUPERSAMPLE
        body, detail = Image.new("L", (big, big)), Image.new("L", (big, big))
        on_body, on_detail = ImageDraw.Draw(body), ImageDraw.Draw(detail)
        draws = {
            "body": [(on_body, 255)],
            "cut": [(on_body, 0)],
            "detail": [(on_detail, 255)],
            "clear": [(on_detail, 0)],
            "both": [(on_body, 255), (on_detail, 255)],
        }
        self._placed, cx, cy = [], big / 2, big / 2
        for shape, place in zip(shapes, places, strict=True):
            radius = 0.4 * big * rng.uniform(0.78, 1.0) * place.size
            angle = math.radians(rng.uniform(-15, 15))
            cx = big / 2 + rng.uniform(-4, 4) * _SUPERSAMPLE * place.size + place.offset * big
            cy = big / 2 + rng.uniform(-4, 4) * _SUPERSAMPLE * place.size
            cos, sin = radius * math.cos(angle), radius * math.sin(angle)
            for kind, points, colour in shape:
                polygon = [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in points]
                self._placed.append((kind, polygon, colour))
                for canvas, value in draws[kind]:
                    canvas.polygon(polygon, fill=value)
        small = body.resize((SIZE, SIZE), Image.Resampling.BOX)
        self.body = unit(small)
        self.detail = unit(detail.resize((SIZE, SIZE), Image.Resampling.BOX))
        self._small = small
        self.shift = (int(round((cx - big / 2) / _SUPERSAMPLE)), int(round((cy - big / 2) / _SUPERSAMPLE)))

    def natural(self) -> np.ndarray:
        """The shapes in their natural colours, (64, 64, 3); what lies outside the body has no meaning."""
        picture = Image.new("RGB", (SIZE * _SUPERSAMPLE,) * 2)
        canvas = ImageDraw.Draw(picture)
        for kind, polygon, colour in self._placed:
            if kind != "cut":
                canvas.polygon(polygon, fill=colour)
        return unit(picture.resize((SIZE, SIZE), Image.Resampling.BOX))

    def blurred(self, sigma: float) -> np.ndarray:
        return unit(self._small.filter(ImageFilter.GaussianBlur(sigma)))

    def edge(self, sigma: float = 1.3) -> np.ndarray:
        soft = self.blurred(sigma)
        return np.clip(4 * soft * (1 - soft), 0, 1) ** 1.5


def unit(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


# --- painting helpers


def rgb(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32) / 255


def flat(colour: np.ndarray) -> np.ndarray:
    return np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()


def mix(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return under + (over - under) * alpha[..., None]


def wave(phase: np.ndarray, sharpness: float = 3.0) -> np.ndarray:
    """A square wave of period 1 with soft flanks, in [0, 1]."""
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(2 * np.pi * phase))


def ramp(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return mix(flat(top), flat(bottom), Y)


def blotches(seed: int, cells: int = 4) -> np.ndarray:
    grid = np.random.default_rng(seed).random((cells, cells), dtype=np.float32)
    return unit(Image.fromarray((grid * 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def tiles(seed: int, cell: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(brightness of each tile, mask of the grout between tiles)."""
    n = SIZE // cell
    shade = np.kron(
        np.random.default_rng(seed).random((n, n), dtype=np.float32), np.ones((cell, cell), np.float32)
    )
    grout = ((np.arange(SIZE) % cell == 0)[:, None] | (np.arange(SIZE) % cell == 0)[None, :]).astype(
        np.float32
    )
    return shade, grout


def filled(under: np.ndarray, m: Masks, body: np.ndarray, detail: np.ndarray, line: np.ndarray | None = None):
    out = mix(under, body, m.body)
    out = mix(out, detail, m.detail * m.body)
    return out if line is None else mix(out, line, m.edge())


def finished(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture in a random brightness, uint8 (64, 64, 3)."""
    return (np.clip(picture * rng.uniform(0.95, 1.05), 0, 1) * 255 + 0.5).astype(np.uint8)
