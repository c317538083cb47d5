"""The largest entries of tensors that are never concatenated: an exact number of them, by a histogram in two
passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

_HALF, _BINS = 16, 1 << 16


@dataclass(frozen=True)
class TopK:
    """Where the largest entries begin.

    Args:
        bits: magnitude at the cut, as the bits of an fp32 number; what is larger is kept. For numbers that
            are not negative the bits order as the numbers do.
        ties: tensor name -> how many of its entries of exactly that magnitude are kept, the first ones in
            memory order.
    """

    bits: int
    ties: Mapping[str, int]

    def mask(self, name: str, tensor: Tensor) -> Tensor:
        """Mask of the kept entries, of the tensor's shape."""
        bits = _bits_of(tensor)
        mask, level = bits > self.bits, (bits == self.bits).flatten().nonzero()[: self.ties.get(name, 0)]
        mask.view(-1)[level] = True
        return mask


def count_of_fraction(fraction: float, size: int) -> int:
    """floor(fraction * size), the fraction taken as the decimal number it is written as: 0.29 of 100 are 29,
    not 28."""
    return math.floor(Fraction(repr(float(fraction))) * size)


def top_k(tensors: Mapping[str, Tensor], count: int, order: Sequence[str] | None = None) -> TopK:
    """The cut that keeps exactly `count` entries of all tensors together, of any shapes; all of them if there
    are not more.

    Entries of equal magnitude are taken by tensor, in `order` (of the names, if it is not given), then in
    memory order. The first pass counts magnitudes by the upper half of their bits, the second one those of
    the bin that the cut lies in by the lower half; no tensor is sorted.
    """
    if count >= sum(tensor.numel() for tensor in tensors.values()):
        return TopK(-1, {})
    if count <= 0:
        return TopK(torch.iinfo(torch.int32).max, {})
    upper, above = _bin_of(sum(_counts(_bits_of(tensor) >> _HALF) for tensor in tensors.values()), count)
    in_bin = (bits[bits >> _HALF == upper] & (_BINS - 1) for bits in map(_bits_of, tensors.values()))
    lower, between = _bin_of(sum(map(_counts, in_bin)), count - above)
    bits, left, ties = (upper << _HALF) + lower, count - above - between, {}
    for name in sorted(tensors) if order is None else order:
        ties[name] = min(left, int((_bits_of(tensors[name]) == bits).sum()))
        left -= ties[name]
    return TopK(bits, ties)


def _bits_of(tensor: Tensor) -> Tensor:
    return tensor.float().abs().contiguous().view(torch.int32)


def _counts(values: Tensor) -> Tensor:
    return torch.bincount(values.flatten(), minlength=_BINS)


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """(bin that holds the `rank`-th largest value, counted from 1; how many values lie in the bins above
    it)."""
    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, rank))
    return len(counts) - 1 - place, int(at_least[place - 1]) if place else 0
