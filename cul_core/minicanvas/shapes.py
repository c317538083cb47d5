"""The objects and people of MiniCanvas: polygons in [-1, 1], y down, each with its natural colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
Colour = tuple[int, int, int]


class Layer(NamedTuple):
    """One polygon of a shape, drawn over those before it.

    Its kind is `body` (adds to the silhouette), `cut` (removes from it), `detail` (drawn inside), `clear`
    (removes from the details) or `both` (silhouette and detail).
    """

    kind: str
    points: Points
    colour: Colour


Shape = tuple[Layer, ...]


def _ellipse(cx: float, cy: float, rx: float, ry: float, points: int = 28) -> list[tuple[float, float]]:
    return [
        (cx + rx * math.cos(2 * math.pi * i / points), cy + ry * math.sin(2 * math.pi * i / points))
        for i in range(points)
    ]


def _half_disc(cx: float, cy: float, rx: float, ry: float, points: int = 16) -> list[tuple[float, float]]:
    """The upper half of an ellipse."""
    turns = [math.pi * (1 + i / points) for i in range(points + 1)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in turns]


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
_POLYGONS: dict[str, list[tuple[str, Points]]] = {
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
    "mushroom": [
        ("body", _half_disc(0, 0.1, 0.95, 0.95)),
        ("body", [(-0.3, 0.05), (0.3, 0.05), (0.4, 0.9), (-0.4, 0.9)]),
        ("detail", _ellipse(-0.42, -0.28, 0.17, 0.17)),
        ("detail", _ellipse(0.12, -0.5, 0.19, 0.19)),
        ("detail", _ellipse(0.56, -0.14, 0.15, 0.15)),
    ],
    "umbrella": [
        ("body", _half_disc(0, 0.05, 0.98, 0.92)),
        *(("cut", _ellipse(x, 0.08, 0.25, 0.16)) for x in (-0.7, 0, 0.7)),
        ("body", [(-0.07, -0.9), (0.07, -0.9), (0.07, 0.78), (-0.07, 0.78)]),
        ("body", [(-0.07, 0.76), (0.38, 0.76), (0.38, 0.55), (0.5, 0.55), (0.5, 0.92), (-0.07, 0.92)]),
        ("detail", [(-0.34, -0.08), (-0.2, -0.08), (0, -0.84), (0.2, -0.08), (0.34, -0.08), (0, -0.92)]),
    ],
    "rocket": [
        ("body", [(-0.34, 0.5), (-0.36, -0.25), (0, -0.98), (0.36, -0.25), (0.34, 0.5)]),
        ("body", [(-0.34, 0.05), (-0.8, 0.72), (-0.34, 0.5)]),
        ("body", [(0.34, 0.05), (0.8, 0.72), (0.34, 0.5)]),
        ("body", [(-0.2, 0.5), (0.2, 0.5), (0, 0.98)]),
        ("detail", _ellipse(0, -0.22, 0.18, 0.18)),
        ("detail", [(-0.2, 0.54), (0.2, 0.54), (0, 0.98)]),
    ],
    "crown": [
        (
            "body",
            [(-0.8, 0.7), (-0.92, -0.5), (-0.42, 0.02), (0, -0.72), (0.42, 0.02), (0.92, -0.5), (0.8, 0.7)],
        ),
        *(("body", _ellipse(x, y, 0.14, 0.14)) for x, y in ((-0.9, -0.56), (0, -0.78), (0.9, -0.56))),
        ("detail", [(-0.79, 0.42), (0.79, 0.42), (0.79, 0.62), (-0.79, 0.62)]),
        ("detail", [(0, -0.12), (0.16, 0.1), (0, 0.32), (-0.16, 0.1)]),
    ],
    "car": [
        (
            "body",
            [
                (-0.98, 0.02),
                (-0.6, -0.04),
                (-0.36, -0.5),
                (0.4, -0.5),
                (0.66, -0.04),
                (0.98, 0.08),
                (0.98, 0.42),
                (-0.98, 0.42),
            ],
        ),
        ("body", _ellipse(-0.54, 0.44, 0.26, 0.26)),
        ("body", _ellipse(0.54, 0.44, 0.26, 0.26)),
        ("detail", _ellipse(-0.54, 0.44, 0.15, 0.15)),
        ("detail", _ellipse(0.54, 0.44, 0.15, 0.15)),
        ("detail", [(-0.46, -0.06), (-0.28, -0.38), (-0.04, -0.38), (-0.04, -0.06)]),
        ("detail", [(0.08, -0.38), (0.34, -0.38), (0.5, -0.06), (0.08, -0.06)]),
    ],
    "bell": [
        ("body", _ellipse(0, -0.82, 0.16, 0.14)),
        (
            "body",
            [
                (-0.14, -0.8),
                (0.14, -0.8),
                (0.46, -0.46),
                (0.54, 0.2),
                (0.86, 0.58),
                (-0.86, 0.58),
                (-0.54, 0.2),
                (-0.46, -0.46),
            ],
        ),
        ("body", _ellipse(0, 0.68, 0.22, 0.22)),
        ("detail", [(-0.6, 0.26), (0.6, 0.26), (0.72, 0.4), (-0.72, 0.4)]),
    ],
}
NATURAL = {  # body and detail colours of the plain style
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
    "mushroom": ((200, 60, 50), (250, 240, 226)),
    "umbrella": ((60, 70, 170), (236, 190, 70)),
    "rocket": ((216, 222, 230), (226, 84, 50)),
    "crown": ((236, 186, 44), (176, 36, 60)),
    "car": ((46, 140, 150), (24, 40, 56)),
    "bell": ((206, 158, 50), (120, 80, 24)),
}
SHAPES: dict[str, Shape] = {
    name: tuple(Layer(kind, points, NATURAL[name][kind == "detail"]) for kind, points in polygons)
    for name, polygons in _POLYGONS.items()
}


# --- faces

_INK = (34, 28, 30)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _hair_behind(kind: str, colour: Colour) -> list[Layer]:
    """Hair that the face lies on."""
    if kind == "long":
        return [Layer("both", [*_half_disc(0, -0.05, 0.84, 0.9), (0.92, 0.95), (-0.92, 0.95)], colour)]
    if kind == "curly":
        turns = [math.pi * (0.92 + 1.16 * i / 8) for i in range(9)]
        curls = [_ellipse(0.7 * math.cos(t), 0.02 + 0.7 * math.sin(t), 0.27, 0.27, 14) for t in turns]
        return [Layer("both", curl, colour) for curl in curls]
    if kind == "pigtails":
        tails = [_ellipse(side * 0.82, 0.12, 0.2, 0.42, 16) for side in (-1, 1)]
        return [Layer("both", tail, colour) for tail in (*tails, _half_disc(0, 0.0, 0.7, 0.78))]
    if kind == "bun":
        return [Layer("both", _ellipse(0, -0.76, 0.27, 0.22, 16), colour)]
    if kind == "spikes":
        return [
            Layer("both", [(x - 0.2, -0.3), (1.35 * x, -0.98 + 0.5 * x * x), (x + 0.2, -0.3)], colour)
            for x in (-0.48, -0.16, 0.16, 0.48)
        ]
    return []


def _hair_before(kind: str, colour: Colour) -> list[Layer]:
    """The fringe over the forehead."""
    if kind in ("long", "pigtails", "bun"):
        return [Layer("both", [*_half_disc(0, -0.12, 0.62, 0.58), (0.3, -0.3), (-0.3, -0.3)], colour)]
    return []


def _hat(kind: str, colour: Colour) -> list[Layer]:
    if kind == "top hat":
        return [
            Layer("both", _box(-0.44, -0.98, 0.44, -0.42), colour),
            Layer("both", _box(-0.8, -0.46, 0.8, -0.3), colour),
        ]
    if kind == "cap":
        return [
            Layer("both", _half_disc(0, -0.22, 0.66, 0.62), colour),
            Layer("both", _box(0.1, -0.36, 0.98, -0.2), colour),
        ]
    return []


def _glasses(kind: str, skin: Colour) -> list[Layer]:
    bridge = Layer("detail", _box(-0.2, 0.0, 0.2, 0.08), _INK)
    if kind == "dark":
        lenses = [_box(-0.52, -0.08, -0.08, 0.22), _box(0.08, -0.08, 0.52, 0.22)]
        return [bridge, *(Layer("detail", lens, _INK) for lens in lenses)]
    if kind == "round":
        rims = [_ellipse(x, 0.06, 0.26, 0.26) for x in (-0.29, 0.29)]
        lenses = [_ellipse(x, 0.06, 0.18, 0.18) for x in (-0.29, 0.29)]
    elif kind == "square":
        rims = [_box(-0.54, -0.16, -0.06, 0.26), _box(0.06, -0.16, 0.54, 0.26)]
        lenses = [_box(-0.46, -0.08, -0.14, 0.18), _box(0.14, -0.08, 0.46, 0.18)]
    else:
        return []
    return [
        bridge,
        *(Layer("detail", rim, _INK) for rim in rims),
        *(Layer("clear", lens, skin) for lens in lenses),
    ]


def _beard(kind: str, colour: Colour) -> list[Layer]:
    if kind == "full":
        chin = [
            (0.62 * math.cos(t), 0.22 + 0.74 * math.sin(t)) for t in (math.pi * i / 16 for i in range(17))
        ]
        return [Layer("both", [*chin, (-0.34, 0.36), (0.34, 0.36)], colour)]
    if kind == "moustache":
        return [Layer("detail", [(-0.44, 0.5), (0, 0.3), (0.44, 0.5), (0.16, 0.48), (-0.16, 0.48)], colour)]
    if kind == "goatee":
        return [Layer("both", [(-0.2, 0.66), (0.2, 0.66), (0.0, 0.98)], colour)]
    return []


def face(
    width: float,
    skin: Colour,
    hair: str = "",
    hair_colour: Colour = _INK,
    glasses: str = "",
    beard: str = "",
    hat: str = "",
    hat_colour: Colour = _INK,
) -> Shape:
    """A face from the front.

    Args:
        width: half its width; its half height is 0.68.
        skin: natural colour.
        hair: `long`, `curly`, `pigtails`, `bun`, `spikes`, or none.
        hair_colour: of hair and beard.
        glasses: `round`, `square`, `dark`, or none.
        beard: `full`, `moustache`, `goatee`, or none.
        hat: `top hat`, `cap`, or none.
        hat_colour: natural colour.
    """
    outline = _ellipse(0, 0.12, width, 0.72)
    eyes = [] if glasses == "dark" else [_ellipse(x, 0.06, 0.09, 0.11, 14) for x in (-0.29, 0.29)]
    mouth = [] if beard == "moustache" else [_box(-0.18, 0.5, 0.18, 0.58)]
    layers = (
        *_hair_behind(hair, hair_colour),
        Layer("body", outline, skin),
        Layer("clear", outline, skin),
        *_hair_before(hair, hair_colour),
        *_beard(beard, hair_colour),
        *_glasses(glasses, skin),
        *(Layer("detail", points, _INK) for points in eyes),
        *(Layer("clear" if beard == "full" else "detail", points, (150, 60, 60)) for points in mouth),
        *_hat(hat, hat_colour),
    )
    return tuple(layer._replace(points=[(1.12 * x, 1.12 * y) for x, y in layer.points]) for layer in layers)
