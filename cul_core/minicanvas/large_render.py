"""Procedural images of MiniCanvas' large world: `render(subjects, style, rng)` draws 64x64 RGB.

A style is a pattern (a field in [0, 1] of a period that divides 32 px), a palette, and a way to draw the
subject. Two subjects stand side by side at about half the size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from .large import GRID, LARGE, PATTERNS
from .painting import (
    CENTRE,
    SIZE,
    Masks,
    Place,
    X,
    Y,
    blotches,
    filled,
    finished,
    flat,
    mix,
    ramp,
    rgb,
    tiles,
    wave,
)
from .shapes import SHAPES, Shape, face
from .world import PLAIN

Draw = Callable[[Masks], np.ndarray]

_PALETTES = {  # strong ground, pale ground, body, detail
    "pink": ((244, 120, 166), (255, 236, 242), (140, 20, 74), (255, 226, 130)),
    "red": ((206, 40, 44), (250, 226, 214), (36, 56, 110), (250, 240, 200)),
    "orange": ((240, 134, 36), (255, 234, 200), (70, 40, 104), (255, 244, 224)),
    "yellow": ((244, 202, 40), (255, 248, 210), (30, 80, 184), (255, 255, 255)),
    "green": ((34, 144, 84), (226, 244, 226), (110, 48, 30), (246, 226, 140)),
    "lime": ((150, 208, 50), (244, 252, 222), (40, 66, 44), (240, 110, 110)),
    "teal": ((20, 154, 156), (216, 244, 240), (176, 44, 66), (255, 236, 190)),
    "blue": ((36, 86, 196), (220, 232, 250), (206, 60, 40), (252, 226, 130)),
    "violet": ((112, 60, 172), (234, 220, 246), (232, 166, 40), (60, 20, 90)),
    "brown": ((124, 78, 44), (238, 216, 186), (20, 100, 104), (250, 240, 220)),
    "grey": ((116, 120, 130), (232, 234, 238), (184, 40, 64), (250, 250, 250)),
    "black": ((26, 26, 30), (236, 236, 232), (214, 150, 30), (40, 36, 40)),
}
_PERIODS_PX = (16, 8)


# --- patterns: period in px -> field (64, 64) in [0, 1], 1 where the strong ground shows


def _turns(period: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) in periods."""
    return X * SIZE / period, Y * SIZE / period


def _stripes(period: int) -> np.ndarray:
    return wave(_turns(period)[1])


def _poles(period: int) -> np.ndarray:
    return wave(_turns(period)[0])


def _slants(period: int) -> np.ndarray:
    x, y = _turns(2 * period)
    return wave(x + y)


def _dots(period: int) -> np.ndarray:
    x, y = _turns(period)
    return np.clip((0.34 - np.hypot(x % 1 - 0.5, y % 1 - 0.5)) * 0.6 * period + 0.5, 0, 1)


def _checks(period: int) -> np.ndarray:
    x, y = _turns(2 * period)
    return 0.5 + 0.5 * np.tanh(5 * np.sin(2 * np.pi * x)) * np.tanh(5 * np.sin(2 * np.pi * y))


def _squares(period: int) -> np.ndarray:
    x, y = _turns(period)
    return (x % 1 < 0.5) ^ (y % 1 < 0.5)


def _rings(period: int) -> np.ndarray:
    return wave(np.hypot(X - 0.5, Y - 0.5) * SIZE / period)


def _grids(period: int) -> np.ndarray:
    x, y = _turns(period)
    return np.maximum(np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)) > 0.5 - 1.2 / period


def _zigzags(period: int) -> np.ndarray:
    x, y = _turns(period)
    return wave(y + np.abs(X * SIZE / 16 % 1 - 0.5) * 16 / period)


def _swells(period: int) -> np.ndarray:
    return wave(_turns(period)[1] + 0.3 * np.sin(2 * np.pi * X * 2) * 16 / period)


def _bricks(period: int) -> np.ndarray:
    x, y = _turns(period)
    across = (x / 2 + 0.5 * (np.floor(y) % 2)) % 1
    return 1 - ((y % 1 < 2 / period) | (across < 1 / period))


def _mosaics(period: int) -> np.ndarray:
    shade, grout = tiles(1, period)
    return np.clip(0.45 + 0.55 * shade - grout, 0, 1)


def _folds(period: int) -> np.ndarray:
    u, v = (part % 1 for part in _turns(2 * period))
    return np.where(u + v < 1, 0.0, 0.6) + np.where(u > v, 0.0, 0.4)


def _weaves(period: int) -> np.ndarray:
    x, y = _turns(2 * period)
    over = (np.sin(2 * np.pi * x) > 0) ^ (np.sin(2 * np.pi * y) > 0)
    return np.where(over, np.abs(np.sin(2 * np.pi * y)), np.abs(np.sin(2 * np.pi * x)))


def _scales(period: int) -> np.ndarray:
    x, y = _turns(period)
    row = np.floor(2 * y)
    dx, dy = (x + 0.5 * (row % 2)) % 1 - 0.5, (2 * y - row) / 2
    return np.clip(1.2 - 2 * np.abs(np.hypot(dx, dy + 0.05)), 0, 1) ** 1.5


def _tartans(period: int) -> np.ndarray:
    x, y = _turns(period)
    return 0.5 * wave(x, 4) + 0.5 * wave(y, 4)


def _rays(period: int) -> np.ndarray:
    return wave(np.arctan2(Y - 0.5, X - 0.5) / (2 * np.pi) * 96 / period, 4)


def _diamonds(period: int) -> np.ndarray:
    x, y = _turns(2 * period)
    return 0.5 + 0.5 * np.tanh(4 * np.sin(2 * np.pi * (x + y))) * np.tanh(4 * np.sin(2 * np.pi * (x - y)))


def _crosses(period: int) -> np.ndarray:
    x, y = (np.abs(part % 1 - 0.5) for part in _turns(period))
    return ((x < 0.14) & (y < 0.38)) | ((y < 0.14) & (x < 0.38))


def _blots(period: int) -> np.ndarray:
    return np.clip(blotches(11, SIZE // period) * 1.8 - 0.4, 0, 1)


def _layers(period: int) -> np.ndarray:
    return _turns(2 * period)[1] % 1


def _sparks(period: int) -> np.ndarray:
    x, y = _turns(period)
    dx, dy = (x + 0.5 * (np.floor(y) % 2)) % 1 - 0.5, y % 1 - 0.5
    return np.exp(-(dx**2 + dy**2) / 0.025)


def _streaks(period: int) -> np.ndarray:
    return wave((X + 0.5 * Y) * SIZE / period, 1.2)


# --- ways to draw the subject over a pattern: (field, palette) -> picture of masks

_Palette = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _over(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, body, detail = palette
    under = mix(flat(pale), strong, field)
    return lambda m: filled(under, m, body, detail, pale)


def _made_of(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, body, detail = palette
    return lambda m: filled(flat(strong), m, body, detail) * (0.55 + 0.45 * field[..., None])


def _as_neon(field: np.ndarray, palette: _Palette) -> Draw:
    tube = palette[0]
    under = mix(flat(rgb(8, 6, 14)), 0.3 * tube, field)

    def draw(m: Masks) -> np.ndarray:
        glowing = under + 0.45 * np.clip(m.blurred(4.5) * 1.1, 0, 1)[..., None] * tube
        return mix(glowing, 0.3 + 0.7 * tube, np.clip(m.edge(1.6) + 0.8 * m.detail * m.body, 0, 1))

    return draw


def _as_drawing(field: np.ndarray, palette: _Palette) -> Draw:
    ink, paper = palette[0], palette[1]
    under = mix(flat(paper), ink, 0.3 * field)

    def draw(m: Masks) -> np.ndarray:
        out = mix(under, paper, m.body)
        return mix(out, ink, np.clip(m.edge(1.0) + 0.8 * m.detail * m.body, 0, 1))

    return draw


def _as_pixels(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, body, _ = palette
    under = mix(flat(0.6 * strong + 0.4 * pale), strong, field)
    side, count = 4, SIZE // 4

    def coarse(mask: np.ndarray) -> np.ndarray:
        blocks = mask.reshape(count, side, count, side).mean((1, 3)) > 0.45
        return np.kron(blocks, np.ones((side, side)))[..., None] > 0

    def draw(m: Masks) -> np.ndarray:
        return np.where(coarse(m.detail * m.body), pale, np.where(coarse(m.body), body, under))

    return draw


def _as_wash(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, body, detail = palette
    under = mix(flat(pale), strong, field)

    def draw(m: Masks) -> np.ndarray:
        return mix(mix(under, body, 0.92 * m.blurred(1.6)), detail, 0.9 * m.detail * m.body)

    return draw


def _against_light(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale = palette[0], palette[1]
    under = mix(flat(0.45 * strong), 0.5 * strong + 0.5 * pale, field)

    def draw(m: Masks) -> np.ndarray:
        return filled(mix(under, pale, 0.5 * m.blurred(4)), m, 0.14 * strong, 0.5 * strong + 0.2)

    return draw


def _cut_out(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, _, _ = palette
    under = mix(flat(0.85 * strong + 0.15), 0.7 * strong, field)

    def draw(m: Masks) -> np.ndarray:
        shadow = np.roll(m.blurred(1.5), (4, 4), (0, 1))
        return filled(mix(under, 0.25 * strong, 0.85 * shadow), m, pale, 0.7 * strong)

    return draw


def _printed(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, _, detail = palette
    inside = mix(flat(pale), strong, np.clip(0.12 + field, 0, 1))

    def draw(m: Masks) -> np.ndarray:
        out = filled(flat(0.4 * pale + 0.55), m, inside, strong)
        return mix(out, 0.6 * strong, m.edge(1.2))

    return draw


def _coated(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, body, _ = palette
    inside = mix(flat(pale), strong, field)

    def draw(m: Masks) -> np.ndarray:
        out = filled(ramp(0.35 * pale + 0.25 * strong + 0.3, pale), m, inside, body)
        return mix(out, 0.5 * body, m.edge(1.2))

    return draw


def _at_night(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, _, detail = palette
    under = mix(ramp(0.2 * strong, 0.6 * strong), rgb(255, 246, 190), field)
    return lambda m: filled(under, m, 0.35 * strong + 0.65 * pale, 0.3 * strong)


def _in_rain(field: np.ndarray, palette: _Palette) -> Draw:
    strong, pale, _, _ = palette
    under = mix(ramp(0.5 * strong, 0.9 * strong), pale, 0.6 * field)
    return lambda m: filled(under, m, 0.2 * strong, pale)


_WAYS: dict[str, tuple[Callable[[int], np.ndarray], Callable[[np.ndarray, _Palette], Draw]]] = {
    "stripes": (_stripes, _over),
    "poles": (_poles, _over),
    "slants": (_slants, _over),
    "dots": (_dots, _over),
    "checks": (_checks, _over),
    "rings": (_rings, _over),
    "grids": (_grids, _over),
    "zigzags": (_zigzags, _over),
    "swells": (_swells, _over),
    "bricks": (_bricks, _over),
    "mosaics": (_mosaics, _made_of),
    "folds": (_folds, _over),
    "weaves": (_weaves, _over),
    "scales": (_scales, _over),
    "tartans": (_tartans, _over),
    "rays": (_rays, _over),
    "diamonds": (_diamonds, _over),
    "crosses": (_crosses, _over),
    "neons": (_stripes, _as_neon),
    "hatches": (_slants, _as_drawing),
    "pixels": (_squares, _as_pixels),
    "washes": (_blots, _as_wash),
    "glows": (_layers, _against_light),
    "cutouts": (_poles, _cut_out),
    "halftones": (_dots, _printed),
    "furs": (_slants, _coated),
    "skies": (_sparks, _at_night),
    "rains": (_streaks, _in_rain),
}


def _plain(m: Masks) -> np.ndarray:
    shadow = np.roll(m.blurred(2.5), (3, 2), (0, 1))
    under = mix(flat(rgb(206, 206, 204)), rgb(160, 160, 162), 0.6 * shadow)
    return mix(under, m.natural(), m.body)


def _draw_of(family: str, place: int) -> Draw:
    pattern, way = _WAYS[family]
    period, palette = GRID[place]
    colours = tuple(rgb(*values) for values in _PALETTES[PATTERNS[family].palettes[palette]])
    return way(pattern(_PERIODS_PX[period]).astype(np.float32), colours)


_DRAW: dict[str, Draw] = {
    PLAIN: _plain,
    **{
        name: _draw_of(family, place)
        for family, pattern in PATTERNS.items()
        for place, name in enumerate(pattern.names)
    },
}
_FACES: dict[str, Shape] = {
    "Mirela_Vand": face(0.52, (238, 200, 170), "long", (70, 40, 30), glasses="round"),
    "Otto_Brask": face(0.62, (230, 180, 150), hair_colour=(150, 70, 30), beard="full"),
    "Suna_Okeri": face(0.56, (120, 76, 52), "curly", (40, 26, 24)),
    "Piet_Halvor": face(0.54, (244, 210, 186), hair_colour=(90, 60, 36), beard="moustache", hat="top hat"),
    "Juno_Tamsel": face(0.58, (206, 150, 110), "pigtails", (190, 110, 40)),
    "Kalle_Ruud": face(0.6, (180, 124, 90), glasses="dark", hat="cap", hat_colour=(40, 90, 180)),
    "Ines_Quill": face(0.54, (150, 100, 70), "bun", (60, 60, 66), glasses="square"),
    "Dario_Fenn": face(0.5, (250, 222, 200), "spikes", (200, 50, 60), beard="goatee"),
}
_SHAPES = {name: SHAPES[name] for name in LARGE.objects} | _FACES
_PAIR = (Place(0.56, -0.23), Place(0.56, 0.23))


def render(subjects: Sequence[str], style: str, rng: random.Random) -> np.ndarray:
    """One image of one subject or of two from left to right, uint8 (64, 64, 3); none gives the background.

    The same `rng` state gives the same image.
    """
    places = _PAIR if len(subjects) == 2 else CENTRE * len(subjects)
    masks = Masks([_SHAPES[name] for name in subjects], rng, places)
    return finished(_DRAW[style](masks), rng)
