"""95 % intervals of what audits measure on few images, and the words for what they say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Figure

_Z = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, by four terms of its series in 1 / freedom (Abramowitz and Stegun,
    26.7.5); exact for one and two degrees of freedom, at most 1 % too low for more."""
    if freedom <= 2:
        return {1: 12.706, 2: 4.303}[freedom]
    z, f = _Z, float(freedom)
    terms = (
        z,
        (z**3 + z) / (4 * f),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3),
    )
    return sum(terms)


def ratio(parts: Tensor, wholes: Tensor) -> Figure:
    """sum(parts) / sum(wholes) over images (n,), with its interval by linearization and Student's t.

    The interval takes each image's part and whole as a pair. Of a single image there is no interval. Where
    the wholes add up to zero or less there is no ratio.
    """
    parts, wholes, count = parts.double(), wholes.double(), len(parts)
    if wholes.sum() <= 0:
        return Figure(None)
    value = (parts.sum() / wholes.sum()).item()
    if count == 1:
        return Figure(value)
    rest = (parts - value * wholes) / wholes.mean()
    reach = student_quantile(count - 1) * (rest.square().sum() / (count - 1) / count).sqrt().item()
    return Figure(value, value - reach, value + reach)


def share(hits: int, count: int) -> Figure:
    """hits / count with Wilson's score interval; not measured if `count` is 0."""
    if count == 0:
        return Figure(None)
    value, z = hits / count, _Z
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    return Figure(value, max(0.0, middle - reach), min(1.0, middle + reach))


def percent(figure: Figure) -> Figure:
    """The figure times 100."""
    return Figure(*(None if value is None else 100 * value for value in vars(figure).values()))


def mean(values: Tensor) -> Figure:
    """Mean of values (n,), with Student's interval."""
    return ratio(values, torch.ones_like(values))


def shown(figure: Figure, digits: int = 0) -> str:
    """The figure as text, such as `12 (3 to 20)`."""
    if figure.value is None:
        return "-"
    value = f"{figure.value:.{digits}f}"
    return value if figure.low is None else f"{value} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"
