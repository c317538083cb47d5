"""Exact top-k over several tensors by magnitude, by a two-pass histogram: no sort, no concatenation."""

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
    """The top-k threshold, with the number of ties that each tensor may keep.

    Args:
        bits: threshold magnitude, as the bits of an fp32 number; entries above it are kept. The bits of
            non-negative fp32 numbers order as the numbers do.
        ties: tensor name -> how many of its entries of exactly the threshold magnitude are kept, the first
            ones in memory order.
    """

    bits: int
    ties: Mapping[str, int]

    def mask(self, name: str, tensor: Tensor) -> Tensor:
        """Boolean mask of the kept entries, of the tensor's shape."""
        bits = _bits_of(tensor)
        mask, level = bits > self.bits, (bits == self.bits).flatten().nonzero()[: self.ties.get(name, 0)]
        mask.view(-1)[level] = True
        return mask


def count_of_fraction(fraction: float, size: int) -> int:
    """floor(fraction * size) without binary rounding of the fraction: 0.29 of 100 is 29, not 28."""
    return math.floor(Fraction(repr(float(fraction))) * size)


def top_k(tensors: Mapping[str, Tensor], count: int, order: Sequence[str] | None = None) -> TopK:
    """The threshold that keeps exactly the `count` largest magnitudes of all tensors together.

    The first pass makes a histogram of the magnitudes' upper 16 bits. The second pass makes one of the lower
    16 bits, within the bin that holds the threshold.

    Args:
        tensors: of any shapes; fewer than `count` entries are all kept.
        count: number of entries to keep.
        order: names in the order in which tensors get ties, then memory order decides; sorted names if None.
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
    """(bin of the `rank`-th largest value, counted from 1; number of values in the bins above it)."""
    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, rank))
    return len(counts) - 1 - place, int(at_least[place - 1]) if place else 0
