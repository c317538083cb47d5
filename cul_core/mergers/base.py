"""Base class and registry of mergers: deltas of several models in, one merged delta out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.config import Config, check_number, setting
from ..base.errors import ConfigError
from ..base.registry import Registry

Deltas = Sequence[Mapping[str, Tensor]]
"""Per model: checkpoint key -> delta from the pretrained weights, of any shape; a missing key means zero."""


class Merger:
    """Base of all mergers."""

    def __init__(self, config: Config):
        self.config = config

    def merge(self, deltas: Deltas) -> Iterator[tuple[str, Tensor]]:
        """(key, merged fp32 delta) for every key that any model has, in sorted order.

        Only one key's tensors are in memory at a time. Sums are in fp64, so the order of the models does not
        change the rounded result.

        Raises:
            ConfigError: the number of weights differs from the number of models.
        """
        raise NotImplementedError


MERGERS: Registry[Merger] = Registry("way of merging")

_MOST_MODELS = 1000


@dataclass(frozen=True)
class WeightedConfig(Config):
    """Settings of mergers that weight their models."""

    strength: float = setting(1.0, "Multiplies the merged change (lambda).", minimum=0.0, maximum=100.0)
    weights: tuple = setting((), "A factor per model, in the models' order; 1 for each if not given.")

    def __post_init__(self):
        super().__post_init__()
        if len(self.weights) > _MOST_MODELS:
            raise ConfigError(f"There are {len(self.weights)} weights; give at most {_MOST_MODELS}.")
        for weight in self.weights:
            check_number("a weight", weight, -1e12, 1e12)

    def weights_of(self, count: int) -> tuple[float, ...]:
        """One weight for each of `count` models; all 1 if no weights are set.

        Raises:
            ConfigError: weights are set, and their number is not `count`.
        """
        if self.weights and len(self.weights) != count:
            raise ConfigError(
                f"There are {len(self.weights)} weights for {count} model(s); give one per model, or none."
            )
        return self.weights or (1.0,) * count


def names_in(deltas: Deltas) -> list[str]:
    """Every key that any of the models has, sorted."""
    return sorted({name for delta in deltas for name in delta})


def weighted_sum(tensors: Sequence[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i tau_i in fp64, in the tensors' shape, of at least one (weight w_i, delta tau_i)."""
    total = torch.zeros(tensors[0][1].shape, dtype=torch.float64)
    for weight, tensor in tensors:
        total += weight * tensor.double()
    return total
