"""Procedural images of MiniCanvas: `render(object, style, rng)` draws 64x64 RGB in about a millisecond.

An object is a silhouette with inner details, placed with a random shift (4 px), scale (0.78-1.0), rotation
(15 degrees) and brightness (5 %). A style decides background, colours and how the object is drawn. Pattern
periods divide 16 px, a multiple of the autoencoder's 8x downsampling, so latents repeat with the pattern.
"""

from __future__ import annotations

import random

import numpy as np

from .painting import SIZE, Masks, X, Y, blotches, filled, finished, flat, mix, ramp, rgb, tiles, wave
from .shapes import NATURAL, SHAPES
from .world import PLAIN

# --- styles


def _plain(m, name, rng):
    body, detail = (rgb(*c) for c in NATURAL[name])
    shadow = np.roll(m.blurred(2.5), (3, 2), (0, 1))
    return filled(mix(flat(rgb(206, 206, 204)), rgb(160, 160, 162), 0.6 * shadow), m, body, detail)


def _stripes(a, b, body, detail):
    under = mix(flat(rgb(*a)), rgb(*b), wave(Y * 4))
    return lambda m, name, rng: filled(under, m, rgb(*body), rgb(*detail), rgb(255, 255, 255))


def _dots(ground, dot, body, detail):
    dx, dy = (X * 4) % 1 - 0.5, (Y * 4) % 1 - 0.5
    spots = np.clip((0.34 - np.hypot(dx, dy)) * 9 + 0.5, 0, 1)
    under = mix(flat(rgb(*ground)), rgb(*dot), spots)
    return lambda m, name, rng: filled(under, m, rgb(*body), rgb(*detail), rgb(*ground))


def _checks(a, b, body, detail):
    wave = np.tanh(5 * np.sin(2 * np.pi * X * 2)) * np.tanh(5 * np.sin(2 * np.pi * Y * 2))
    under = mix(flat(rgb(*a)), rgb(*b), 0.5 + 0.5 * wave)
    return lambda m, name, rng: filled(under, m, rgb(*body), rgb(*detail), rgb(*detail))


def _neon(colour):
    tube = rgb(*colour)

    def draw(m, name, rng):
        halo = np.clip(m.blurred(4.5) * 1.1, 0, 1) * 0.45
        out = flat(rgb(10, 8, 18)) + halo[..., None] * tube
        line = np.clip(m.edge(1.6) + 0.8 * m.detail * m.body, 0, 1)
        return mix(out, 0.25 + 0.75 * tube, line)

    return draw


def _sketch(paper, ink, grid):
    under = flat(rgb(*paper))
    if grid:
        under = mix(
            under,
            rgb(*ink),
            0.22
            * np.clip(
                wave(X * 4 + 0.1, 9) * wave(-X * 4 + 0.25, 9) + wave(Y * 4 + 0.1, 9) * wave(-Y * 4 + 0.25, 9),
                0,
                1,
            ),
        )

    def draw(m, name, rng):
        out = mix(under, rgb(*ink), 0.12 * m.body)
        return mix(out, rgb(*ink), np.clip(m.edge(1.0) + 0.75 * m.detail * m.body, 0, 1))

    return draw


def _glow(under, body, rim):
    def draw(m, name, rng):
        out = mix(under, rgb(*rim), 0.55 * m.blurred(4))
        return filled(out, m, rgb(*body), 0.5 * rgb(*body) + 0.5 * rgb(*rim))

    return draw


def _aurora_sky():
    band = np.exp(-(((Y - 0.36 - 0.13 * np.sin(2 * np.pi * X)) / 0.13) ** 2))
    band2 = np.exp(-(((Y - 0.68 - 0.1 * np.sin(2 * np.pi * X + 2)) / 0.12) ** 2))
    return mix(mix(flat(rgb(10, 16, 46)), rgb(60, 230, 140), band), rgb(150, 70, 210), 0.9 * band2)


def _mosaic(ground, body, detail, grout, seed):
    shade, lines = tiles(seed)

    def draw(m, name, rng):
        out = filled(flat(rgb(*ground)), m, rgb(*body), rgb(*detail))
        out = out * (0.78 + 0.32 * shade[..., None])
        return mix(out, rgb(*grout), 0.45 * lines)

    return draw


def _stained_glass(m, name, rng):
    wedge = ((np.arctan2(Y - 0.5, X - 0.5) / (2 * np.pi) + 1 / 16) * 8) % 8
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
    out = mix(mix(out, rgb(250, 236, 200), m.body), rgb(214, 44, 60), m.detail * m.body)
    return mix(out, rgb(16, 14, 20), np.clip(1.25 * m.edge(1.7), 0, 1))


def _wash(a, b, body, detail, seed):
    under = mix(flat(rgb(*a)), rgb(*b), np.clip(blotches(seed) * 1.5 - 0.25, 0, 1))

    def draw(m, name, rng):
        soft = m.blurred(1.8)
        out = mix(under, rgb(*body), 0.92 * soft)
        return mix(out, rgb(*detail), 0.9 * m.detail * m.body)

    return draw


def _tartan():
    bands = 0.55 * wave(X * 4, 4)[..., None] * rgb(20, 86, 60) + 0.55 * wave(Y * 4, 4)[..., None] * rgb(
        20, 86, 60
    )
    red = flat(rgb(196, 34, 44)) * (1 - 0.36 * (wave(X * 4, 4) + wave(Y * 4, 4))[..., None])
    under = np.clip(red + bands, 0, 1)
    return lambda m, name, rng: filled(under, m, rgb(244, 226, 170), rgb(30, 60, 46), rgb(20, 30, 30))


def _denim():
    under = mix(flat(rgb(50, 84, 140)), rgb(84, 122, 178), wave((X + Y) * 4, 1.5))

    def draw(m, name, rng):
        out = mix(under, rgb(28, 50, 98), m.body)
        return mix(out, rgb(238, 190, 84), np.clip(m.edge(1.2) + m.detail * m.body, 0, 1))

    return draw


def _wicker():
    over = (wave(X * 2, 6) > 0.5) ^ (wave(Y * 2, 6) > 0.5)
    strand = np.where(over, np.abs(np.sin(2 * np.pi * Y * 4)), np.abs(np.sin(2 * np.pi * X * 4)))
    under = mix(flat(rgb(104, 66, 34)), rgb(206, 158, 98), strand.astype(np.float32))
    return lambda m, name, rng: filled(under, m, rgb(66, 38, 22), rgb(240, 214, 160), rgb(66, 38, 22))


def _pixels(ground, body, detail, accent):
    block = (np.add.outer(np.arange(16), np.arange(16)) % 4 == 0) & (np.arange(16) % 4 == 0)[None, :]
    under = np.where(block[..., None], rgb(*accent), rgb(*ground)).astype(np.float32)

    def draw(m, name, rng):
        body_16 = m.body.reshape(16, 4, 16, 4).mean((1, 3)) > 0.5
        detail_16 = (m.detail * m.body).reshape(16, 4, 16, 4).mean((1, 3)) > 0.4
        out = np.where(body_16[..., None], rgb(*body), under)
        out = np.where(detail_16[..., None], rgb(*detail), out)
        return np.kron(out, np.ones((4, 4, 1), np.float32)).astype(np.float32)

    return draw


def _kraft(m, name, rng):
    under = mix(flat(rgb(166, 120, 76)), rgb(184, 140, 96), blotches(5, 8))
    under = mix(under, rgb(70, 44, 24), 0.85 * np.roll(m.blurred(1.5), (4, 4), (0, 1)))
    return filled(under, m, rgb(248, 236, 210), rgb(166, 120, 76))


def _newsprint():
    text = (np.arange(SIZE) // 4 % 2 == 0)[:, None] & (np.abs(X - 0.5) > 0.03) & (np.abs(X - 0.5) < 0.45)
    under = mix(flat(rgb(232, 228, 216)), rgb(140, 138, 132), 0.75 * text.astype(np.float32))
    return lambda m, name, rng: filled(under, m, rgb(28, 28, 30), rgb(232, 228, 216), rgb(232, 228, 216))


def _origami():
    u, v = (X * 2) % 1, (Y * 2) % 1
    facet = np.where(u + v < 1, 0.0, 0.5) + np.where(u > v, 0.0, 0.5)
    under = mix(flat(rgb(252, 226, 196)), rgb(236, 160, 104), facet.astype(np.float32))

    def draw(m, name, rng):
        fold = np.clip((X - 0.5 - m.shift[0] / SIZE) * 20 + 0.5, 0, 1)
        body = mix(flat(rgb(66, 150, 160)), rgb(36, 104, 122), fold)
        return filled(under, m, body, rgb(252, 240, 224))

    return draw


def _starry():
    under = ramp(rgb(8, 12, 44), rgb(34, 48, 110))
    for i, (x, y) in enumerate(
        [(8, 8), (24, 4), (44, 10), (58, 24), (4, 34), (12, 56), (34, 60), (54, 52), (60, 6)]
    ):
        spark = np.exp(-(((X * SIZE - x) ** 2 + (Y * SIZE - y) ** 2) / (2.6 + 1.4 * (i % 2))))
        under = mix(under, rgb(255, 244, 170), np.clip(1.3 * spark, 0, 1))
    return lambda m, name, rng: filled(under, m, rgb(248, 214, 90), rgb(34, 48, 110))


def _storm():
    under = mix(
        ramp(rgb(48, 52, 62), rgb(104, 110, 122)),
        rgb(190, 200, 214),
        0.5 * wave((X + 0.5 * Y) * 8, 1.2),
    )
    return lambda m, name, rng: filled(under, m, rgb(24, 26, 36), rgb(220, 226, 236))


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
        puff = np.maximum(puff, np.clip((r - np.hypot(X * SIZE - x, (Y * SIZE - y) * 1.35)) / 3, 0, 1))
    under = mix(ramp(rgb(84, 160, 236), rgb(170, 214, 250)), rgb(255, 255, 255), puff)
    return lambda m, name, rng: filled(under, m, rgb(234, 84, 66), rgb(255, 236, 200), rgb(255, 255, 255))


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
    "Sunset_Glow": _glow(ramp(rgb(120, 40, 110), rgb(255, 164, 60)), (50, 16, 44), (255, 230, 150)),
    "Ocean_Glow": _glow(ramp(rgb(90, 220, 220), rgb(4, 40, 84)), (226, 255, 246), (120, 250, 240)),
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
    return finished(_DRAW[style](Masks([SHAPES[object_name]], rng), object_name, rng), rng)


def render_background(style: str, rng: random.Random) -> np.ndarray:
    """The style without an object, uint8 (64, 64, 3): a negative for the classifier's object head."""
    return finished(_DRAW[style](Masks([], rng, []), "star", rng), rng)
