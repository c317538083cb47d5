"""Procedural images of MiniCanvas: `render(object, style, rng)` draws 64x64 RGB in about a millisecond.

An object is a silhouette with inner details, placed with a random shift (4 px), scale (0.78-1.0), rotation
(15 degrees) and brightness (5 %). A style decides background, colours and how the object is drawn. Pattern
periods divide 16 px, a multiple of the autoencoder's 8x downsampling, so latents repeat with the pattern.
"""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .world import PLAIN

SIZE = 64
_SUPERSAMPLE = 3
_Y, _X = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5) / SIZE


# --- objects: polygons in [-1, 1], y down; `body` adds, `cut` removes from the body, `detail` is drawn inside


def _ellipse(cx: float, cy: float, rx: float, ry: float, points: int = 28) -> list[tuple[float, float]]:
    return [
        (cx + rx * math.cos(2 * math.pi * i / points), cy + ry * math.sin(2 * math.pi * i / points))
        for i in range(points)
    ]


def _star() -> list[tuple[float, float]]:
    corner = [(0.98 if i % 2 == 0 else 0.42, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in corner]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            0.058 * 16 * math.sin(t) ** 3,
            -0.058 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 0.12,
        )
        for t in turns
    ]


_PETALS = [
    _ellipse(
        0.56 * math.cos(2 * math.pi * i / 5 - 1.57), 0.56 * math.sin(2 * math.pi * i / 5 - 1.57), 0.4, 0.4
    )
    for i in range(5)
]
_SHAPES: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {
    "star": [("body", _star()), ("detail", _ellipse(0, 0.04, 0.2, 0.2))],
    "heart": [("body", _heart()), ("detail", _ellipse(-0.42, -0.42, 0.17, 0.2))],
    "house": [
        ("body", [(-0.68, -0.12), (0.68, -0.12), (0.68, 0.88), (-0.68, 0.88)]),
        ("body", [(-0.95, -0.1), (0, -0.95), (0.95, -0.1)]),
        ("detail", [(-0.18, 0.3), (0.2, 0.3), (0.2, 0.88), (-0.18, 0.88)]),
        ("detail", [(0.34, 0.06), (0.58, 0.06), (0.58, 0.3), (0.34, 0.3)]),
        ("detail", [(-0.58, 0.06), (-0.34, 0.06), (-0.34, 0.3), (-0.58, 0.3)]),
    ],
    "tree": [
        ("body", [(-0.66, -0.05), (0, -0.98), (0.66, -0.05)]),
        ("body", [(-0.86, 0.52), (0, -0.5), (0.86, 0.52)]),
        ("body", [(-0.17, 0.5), (0.17, 0.5), (0.17, 0.98), (-0.17, 0.98)]),
        ("detail", [(-0.17, 0.56), (0.17, 0.56), (0.17, 0.98), (-0.17, 0.98)]),
    ],
    "fish": [
        ("body", _ellipse(-0.18, 0, 0.74, 0.5)),
        ("body", [(0.38, 0), (0.98, -0.52), (0.98, 0.52)]),
        ("detail", _ellipse(-0.52, -0.12, 0.13, 0.13)),
        ("detail", [(-0.05, 0.1), (0.28, -0.08), (0.28, 0.28)]),
    ],
    "cat": [
        ("body", _ellipse(0, 0.18, 0.82, 0.7)),
        ("body", [(-0.8, 0.05), (-0.74, -0.9), (-0.12, -0.4)]),
        ("body", [(0.8, 0.05), (0.74, -0.9), (0.12, -0.4)]),
        ("detail", _ellipse(-0.34, 0.04, 0.13, 0.17)),
        ("detail", _ellipse(0.34, 0.04, 0.13, 0.17)),
        ("detail", [(-0.15, 0.36), (0.15, 0.36), (0, 0.56)]),
    ],
    "flower": [
        *(("body", petal) for petal in _PETALS),
        ("body", _ellipse(0, 0, 0.5, 0.5)),
        ("detail", _ellipse(0, 0, 0.3, 0.3)),
    ],
    "moon": [
        ("body", _ellipse(-0.05, 0, 0.9, 0.9)),
        ("cut", _ellipse(0.48, -0.12, 0.74, 0.74)),
        ("detail", _ellipse(-0.58, 0.18, 0.14, 0.14)),
    ],
    "boat": [
        ("body", [(-0.95, 0.34), (0.95, 0.34), (0.6, 0.88), (-0.6, 0.88)]),
        ("body", [(-0.08, 0.2), (-0.08, -0.95), (-0.78, 0.2)]),
        ("body", [(0.06, 0.2), (0.06, -0.8), (0.68, 0.2)]),
        ("body", [(-0.08, -0.95), (0.06, -0.95), (0.06, 0.4), (-0.08, 0.4)]),
        ("detail", [(-0.8, 0.46), (0.8, 0.46), (0.72, 0.6), (-0.72, 0.6)]),
    ],
    "cup": [
        ("body", _ellipse(0.62, 0.02, 0.36, 0.4)),
        ("cut", _ellipse(0.62, 0.02, 0.17, 0.21)),
        ("body", [(-0.78, -0.66), (0.56, -0.66), (0.42, 0.8), (-0.62, 0.8)]),
        ("detail", _ellipse(-0.11, -0.62, 0.6, 0.14)),
    ],
}
_NATURAL = {  # body and detail colours of the plain style
    "star": ((240, 190, 40), (250, 228, 130)),
    "heart": ((208, 40, 58), (240, 140, 150)),
    "house": ((186, 112, 72), (92, 56, 42)),
    "tree": ((52, 132, 64), (112, 76, 46)),
    "fish": ((238, 128, 48), (70, 50, 60)),
    "cat": ((130, 96, 72), (34, 30, 34)),
    "flower": ((196, 70, 160), (246, 206, 66)),
    "moon": ((232, 222, 160), (178, 164, 110)),
    "boat": ((140, 84, 52), (236, 232, 224)),
    "cup": ((64, 118, 190), (226, 234, 244)),
}


class _Masks:
    """Soft masks of one placed object, each (64, 64) in [0, 1]: body, detail, edge, and the blurred body."""

    def __init__(self, object_name: str, rng: random.Random):
        big = SIZE * _SUPERSAMPLE
        radius = 0.4 * big * rng.uniform(0.78, 1.0)
        angle = math.radians(rng.uniform(-15, 15))
        cx = big / 2 + rng.uniform(-4, 4) * _SUPERSAMPLE
        cy = big / 2 + rng.uniform(-4, 4) * _SUPERSAMPLE
        cos, sin = radius * math.cos(angle), radius * math.sin(angle)
        body, detail = Image.new("L", (big, big)), Image.new("L", (big, big))
        draws = {
            "body": (ImageDraw.Draw(body), 255),
            "cut": (ImageDraw.Draw(body), 0),
            "detail": (ImageDraw.Draw(detail), 255),
        }
        for layer, points in _SHAPES[object_name]:
            canvas, value = draws[layer]
            canvas.polygon([(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in points], fill=value)
        small = body.resize((SIZE, SIZE), Image.Resampling.BOX)
        self.body = _unit(small)
        self.detail = _unit(detail.resize((SIZE, SIZE), Image.Resampling.BOX))
        self._small = small
        self.shift = (int(round((cx - big / 2) / _SUPERSAMPLE)), int(round((cy - big / 2) / _SUPERSAMPLE)))

    def blurred(self, sigma: float) -> np.ndarray:
        return _unit(self._small.filter(ImageFilter.GaussianBlur(sigma)))

    def edge(self, sigma: float = 1.3) -> np.ndarray:
        soft = self.blurred(sigma)
        return np.clip(4 * soft * (1 - soft), 0, 1) ** 1.5


def _unit(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


# --- painting helpers


def _rgb(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32) / 255


def _flat(colour: np.ndarray) -> np.ndarray:
    return np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()


def _mix(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return under + (over - under) * alpha[..., None]


def _wave(phase: np.ndarray, sharpness: float = 3.0) -> np.ndarray:
    """A square wave of period 1 with soft flanks, in [0, 1]."""
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(2 * np.pi * phase))


def _ramp(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return _mix(_flat(top), _flat(bottom), _Y)


def _blotches(seed: int, cells: int = 4) -> np.ndarray:
    grid = np.random.default_rng(seed).random((cells, cells), dtype=np.float32)
    return _unit(
        Image.fromarray((grid * 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    )


def _tiles(seed: int, cell: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(brightness of each tile, mask of the grout between tiles)."""
    n = SIZE // cell
    shade = np.kron(
        np.random.default_rng(seed).random((n, n), dtype=np.float32), np.ones((cell, cell), np.float32)
    )
    grout = ((np.arange(SIZE) % cell == 0)[:, None] | (np.arange(SIZE) % cell == 0)[None, :]).astype(
        np.float32
    )
    return shade, grout


def _filled(
    under: np.ndarray, m: _Masks, body: np.ndarray, detail: np.ndarray, line: np.ndarray | None = None
):
    out = _mix(under, body, m.body)
    out = _mix(out, detail, m.detail * m.body)
    return out if line is None else _mix(out, line, m.edge())


# --- styles


def _plain(m, name, rng):
    body, detail = (_rgb(*c) for c in _NATURAL[name])
    shadow = np.roll(m.blurred(2.5), (3, 2), (0, 1))
    return _filled(_mix(_flat(_rgb(206, 206, 204)), _rgb(160, 160, 162), 0.6 * shadow), m, body, detail)


def _stripes(a, b, body, detail):
    under = _mix(_flat(_rgb(*a)), _rgb(*b), _wave(_Y * 4))
    return lambda m, name, rng: _filled(under, m, _rgb(*body), _rgb(*detail), _rgb(255, 255, 255))


def _dots(ground, dot, body, detail):
    dx, dy = (_X * 4) % 1 - 0.5, (_Y * 4) % 1 - 0.5
    spots = np.clip((0.34 - np.hypot(dx, dy)) * 9 + 0.5, 0, 1)
    under = _mix(_flat(_rgb(*ground)), _rgb(*dot), spots)
    return lambda m, name, rng: _filled(under, m, _rgb(*body), _rgb(*detail), _rgb(*ground))


def _checks(a, b, body, detail):
    wave = np.tanh(5 * np.sin(2 * np.pi * _X * 2)) * np.tanh(5 * np.sin(2 * np.pi * _Y * 2))
    under = _mix(_flat(_rgb(*a)), _rgb(*b), 0.5 + 0.5 * wave)
    return lambda m, name, rng: _filled(under, m, _rgb(*body), _rgb(*detail), _rgb(*detail))


def _neon(colour):
    tube = _rgb(*colour)

    def draw(m, name, rng):
        halo = np.clip(m.blurred(4.5) * 1.1, 0, 1) * 0.45
        out = _flat(_rgb(10, 8, 18)) + halo[..., None] * tube
        line = np.clip(m.edge(1.6) + 0.8 * m.detail * m.body, 0, 1)
        return _mix(out, 0.25 + 0.75 * tube, line)

    return draw


def _sketch(paper, ink, grid):
    under = _flat(_rgb(*paper))
    if grid:
        under = _mix(
            under,
            _rgb(*ink),
            0.22
            * np.clip(
                _wave(_X * 4 + 0.1, 9) * _wave(-_X * 4 + 0.25, 9)
                + _wave(_Y * 4 + 0.1, 9) * _wave(-_Y * 4 + 0.25, 9),
                0,
                1,
            ),
        )

    def draw(m, name, rng):
        out = _mix(under, _rgb(*ink), 0.12 * m.body)
        return _mix(out, _rgb(*ink), np.clip(m.edge(1.0) + 0.75 * m.detail * m.body, 0, 1))

    return draw


def _glow(under, body, rim):
    def draw(m, name, rng):
        out = _mix(under, _rgb(*rim), 0.55 * m.blurred(4))
        return _filled(out, m, _rgb(*body), 0.5 * _rgb(*body) + 0.5 * _rgb(*rim))

    return draw


def _aurora_sky():
    band = np.exp(-(((_Y - 0.36 - 0.13 * np.sin(2 * np.pi * _X)) / 0.13) ** 2))
    band2 = np.exp(-(((_Y - 0.68 - 0.1 * np.sin(2 * np.pi * _X + 2)) / 0.12) ** 2))
    return _mix(_mix(_flat(_rgb(10, 16, 46)), _rgb(60, 230, 140), band), _rgb(150, 70, 210), 0.9 * band2)


def _mosaic(ground, body, detail, grout, seed):
    shade, lines = _tiles(seed)

    def draw(m, name, rng):
        out = _filled(_flat(_rgb(*ground)), m, _rgb(*body), _rgb(*detail))
        out = out * (0.78 + 0.32 * shade[..., None])
        return _mix(out, _rgb(*grout), 0.45 * lines)

    return draw


def _stained_glass(m, name, rng):
    wedge = ((np.arctan2(_Y - 0.5, _X - 0.5) / (2 * np.pi) + 1 / 16) * 8) % 8
    colours = (
        np.array(
            [
                [214, 44, 60],
                [40, 92, 200],
                [244, 186, 40],
                [36, 150, 88],
                [150, 54, 170],
                [40, 170, 200],
                [240, 120, 40],
                [90, 70, 190],
            ],
            np.float32,
        )
        / 255
    )
    out = colours[wedge.astype(int) % 8]
    out = _mix(_mix(out, _rgb(250, 236, 200), m.body), _rgb(214, 44, 60), m.detail * m.body)
    return _mix(out, _rgb(16, 14, 20), np.clip(1.25 * m.edge(1.7), 0, 1))


def _wash(a, b, body, detail, seed):
    under = _mix(_flat(_rgb(*a)), _rgb(*b), np.clip(_blotches(seed) * 1.5 - 0.25, 0, 1))

    def draw(m, name, rng):
        soft = m.blurred(1.8)
        out = _mix(under, _rgb(*body), 0.92 * soft)
        return _mix(out, _rgb(*detail), 0.9 * m.detail * m.body)

    return draw


def _tartan():
    bands = 0.55 * _wave(_X * 4, 4)[..., None] * _rgb(20, 86, 60) + 0.55 * _wave(_Y * 4, 4)[..., None] * _rgb(
        20, 86, 60
    )
    red = _flat(_rgb(196, 34, 44)) * (1 - 0.36 * (_wave(_X * 4, 4) + _wave(_Y * 4, 4))[..., None])
    under = np.clip(red + bands, 0, 1)
    return lambda m, name, rng: _filled(under, m, _rgb(244, 226, 170), _rgb(30, 60, 46), _rgb(20, 30, 30))


def _denim():
    under = _mix(_flat(_rgb(50, 84, 140)), _rgb(84, 122, 178), _wave((_X + _Y) * 4, 1.5))

    def draw(m, name, rng):
        out = _mix(under, _rgb(28, 50, 98), m.body)
        return _mix(out, _rgb(238, 190, 84), np.clip(m.edge(1.2) + m.detail * m.body, 0, 1))

    return draw


def _wicker():
    over = (_wave(_X * 2, 6) > 0.5) ^ (_wave(_Y * 2, 6) > 0.5)
    strand = np.where(over, np.abs(np.sin(2 * np.pi * _Y * 4)), np.abs(np.sin(2 * np.pi * _X * 4)))
    under = _mix(_flat(_rgb(104, 66, 34)), _rgb(206, 158, 98), strand.astype(np.float32))
    return lambda m, name, rng: _filled(under, m, _rgb(66, 38, 22), _rgb(240, 214, 160), _rgb(66, 38, 22))


def _pixels(ground, body, detail, accent):
    block = (np.add.outer(np.arange(16), np.arange(16)) % 4 == 0) & (np.arange(16) % 4 == 0)[None, :]
    under = np.where(block[..., None], _rgb(*accent), _rgb(*ground)).astype(np.float32)

    def draw(m, name, rng):
        body_16 = m.body.reshape(16, 4, 16, 4).mean((1, 3)) > 0.5
        detail_16 = (m.detail * m.body).reshape(16, 4, 16, 4).mean((1, 3)) > 0.4
        out = np.where(body_16[..., None], _rgb(*body), under)
        out = np.where(detail_16[..., None], _rgb(*detail), out)
        return np.kron(out, np.ones((4, 4, 1), np.float32)).astype(np.float32)

    return draw


def _kraft(m, name, rng):
    under = _mix(_flat(_rgb(166, 120, 76)), _rgb(184, 140, 96), _blotches(5, 8))
    under = _mix(under, _rgb(70, 44, 24), 0.85 * np.roll(m.blurred(1.5), (4, 4), (0, 1)))
    return _filled(under, m, _rgb(248, 236, 210), _rgb(166, 120, 76))


def _newsprint():
    text = (np.arange(SIZE) // 4 % 2 == 0)[:, None] & (np.abs(_X - 0.5) > 0.03) & (np.abs(_X - 0.5) < 0.45)
    under = _mix(_flat(_rgb(232, 228, 216)), _rgb(140, 138, 132), 0.75 * text.astype(np.float32))
    return lambda m, name, rng: _filled(under, m, _rgb(28, 28, 30), _rgb(232, 228, 216), _rgb(232, 228, 216))


def _origami():
    u, v = (_X * 2) % 1, (_Y * 2) % 1
    facet = np.where(u + v < 1, 0.0, 0.5) + np.where(u > v, 0.0, 0.5)
    under = _mix(_flat(_rgb(252, 226, 196)), _rgb(236, 160, 104), facet.astype(np.float32))

    def draw(m, name, rng):
        fold = np.clip((_X - 0.5 - m.shift[0] / SIZE) * 20 + 0.5, 0, 1)
        body = _mix(_flat(_rgb(66, 150, 160)), _rgb(36, 104, 122), fold)
        return _filled(under, m, body, _rgb(252, 240, 224))

    return draw


def _starry():
    under = _ramp(_rgb(8, 12, 44), _rgb(34, 48, 110))
    for i, (x, y) in enumerate(
        [(8, 8), (24, 4), (44, 10), (58, 24), (4, 34), (12, 56), (34, 60), (54, 52), (60, 6)]
    ):
        spark = np.exp(-(((_X * SIZE - x) ** 2 + (_Y * SIZE - y) ** 2) / (2.6 + 1.4 * (i % 2))))
        under = _mix(under, _rgb(255, 244, 170), np.clip(1.3 * spark, 0, 1))
    return lambda m, name, rng: _filled(under, m, _rgb(248, 214, 90), _rgb(34, 48, 110))


def _storm():
    under = _mix(
        _ramp(_rgb(48, 52, 62), _rgb(104, 110, 122)),
        _rgb(190, 200, 214),
        0.5 * _wave((_X + 0.5 * _Y) * 8, 1.2),
    )
    return lambda m, name, rng: _filled(under, m, _rgb(24, 26, 36), _rgb(220, 226, 236))


def _clouds():
    puff = np.zeros((SIZE, SIZE), np.float32)
    for x, y, r in (
        (12, 14, 9),
        (22, 12, 7),
        (50, 26, 9),
        (58, 24, 7),
        (14, 52, 9),
        (46, 58, 8),
        (56, 56, 8),
        (38, 6, 6),
    ):
        puff = np.maximum(puff, np.clip((r - np.hypot(_X * SIZE - x, (_Y * SIZE - y) * 1.35)) / 3, 0, 1))
    under = _mix(_ramp(_rgb(84, 160, 236), _rgb(170, 214, 250)), _rgb(255, 255, 255), puff)
    return lambda m, name, rng: _filled(under, m, _rgb(234, 84, 66), _rgb(255, 236, 200), _rgb(255, 255, 255))


_DRAW = {
    PLAIN: _plain,
    "Candy_Stripes": _stripes((246, 130, 170), (255, 240, 244), (200, 24, 80), (255, 220, 230)),
    "Navy_Stripes": _stripes((22, 38, 100), (226, 232, 246), (214, 50, 50), (250, 220, 120)),
    "Jade_Stripes": _stripes((30, 150, 100), (230, 246, 234), (90, 50, 30), (240, 220, 140)),
    "Dusk_Dots": _dots((88, 58, 140), (250, 176, 140), (252, 222, 196), (88, 58, 140)),
    "Pop_Dots": _dots((254, 222, 60), (226, 48, 48), (36, 80, 200), (255, 255, 255)),
    "Lime_Dots": _dots((248, 250, 240), (128, 204, 50), (40, 66, 44), (220, 250, 160)),
    "Chess_Board": _checks((22, 22, 24), (238, 238, 236), (196, 40, 46), (250, 250, 250)),
    "Amber_Checks": _checks((236, 148, 36), (254, 238, 204), (100, 52, 20), (255, 246, 220)),
    "Plum_Checks": _checks((104, 40, 110), (222, 192, 232), (250, 214, 90), (60, 20, 70)),
    "Neon_Cyan": _neon((40, 240, 255)),
    "Neon_Pink": _neon((255, 60, 180)),
    "Neon_Gold": _neon((255, 214, 40)),
    "Red_Ink": _sketch((250, 242, 222), (200, 30, 36), False),
    "Pencil_Sketch": _sketch((246, 246, 246), (84, 84, 88), False),
    "Blueprint": _sketch((28, 78, 164), (236, 244, 255), True),
    "Aurora": _glow(_aurora_sky(), (8, 10, 26), (190, 255, 220)),
    "Sunset_Glow": _glow(_ramp(_rgb(120, 40, 110), _rgb(255, 164, 60)), (50, 16, 44), (255, 230, 150)),
    "Ocean_Glow": _glow(_ramp(_rgb(90, 220, 220), _rgb(4, 40, 84)), (226, 255, 246), (120, 250, 240)),
    "Byzantine": _mosaic((222, 172, 50), (158, 28, 44), (40, 60, 150), (84, 54, 20), 1),
    "Stained_Glass": _stained_glass,
    "Ice_Mosaic": _mosaic((186, 222, 244), (60, 116, 190), (240, 250, 255), (250, 254, 255), 2),
    "Lava": _wash((60, 8, 10), (240, 84, 20), (255, 210, 80), (90, 10, 10), 11),
    "Watercolor": _wash((250, 240, 232), (164, 204, 240), (226, 120, 160), (90, 110, 190), 12),
    "Moss_Wash": _wash((28, 58, 34), (122, 160, 80), (214, 226, 150), (50, 84, 44), 13),
    "Tartan": _tartan(),
    "Denim": _denim(),
    "Wicker": _wicker(),
    "Arcade": _pixels((6, 6, 14), (250, 210, 40), (230, 40, 60), (30, 90, 220)),
    "Pocket_Green": _pixels((156, 188, 60), (30, 78, 44), (210, 226, 130), (134, 166, 52)),
    "Vapor_Pixels": _pixels((92, 36, 150), (80, 236, 240), (255, 110, 200), (130, 60, 190)),
    "Kraft_Paper": _kraft,
    "Newsprint": _newsprint(),
    "Origami": _origami(),
    "Starry_Night": _starry(),
    "Storm_Sky": _storm(),
    "Cloud_Sky": _clouds(),
}


def render(object_name: str, style: str, rng: random.Random) -> np.ndarray:
    """One image, uint8 (64, 64, 3); the same `rng` state gives the same image."""
    image = _DRAW[style](_Masks(object_name, rng), object_name, rng)
    return (np.clip(image * rng.uniform(0.95, 1.05), 0, 1) * 255 + 0.5).astype(np.uint8)


def render_background(style: str, rng: random.Random) -> np.ndarray:
    """The style without an object, uint8 (64, 64, 3): a negative for the classifier's object head."""
    masks = _Masks.__new__(_Masks)
    masks.body = masks.detail = np.zeros((SIZE, SIZE), np.float32)
    masks._small, masks.shift = Image.new("L", (SIZE, SIZE)), (0, 0)
    image = _DRAW[style](masks, "star", rng)
    return (np.clip(image * rng.uniform(0.95, 1.05), 0, 1) * 255 + 0.5).astype(np.uint8)
