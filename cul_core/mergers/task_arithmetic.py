"""Task arithmetic: the weighted sum of the models' deltas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .base import MERGERS, Deltas, Merger, WeightedConfig, names_in, weighted_sum


@dataclass(frozen=True)
class TaskArithmeticConfig(WeightedConfig):
    """Strength 1 adds every model's delta in full."""


@MERGERS.register(
    "task_arithmetic",
    config=TaskArithmeticConfig,
    display_name="Task Arithmetic",
    description="The sum of the models' changes: nothing is diluted, but damage to the rest adds up too.",
    paper="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089",
)
class TaskArithmetic(Merger):
    """W = W0 + strength * sum_i weight_i tau_i (Ilharco et al., section 2)."""

    config: TaskArithmeticConfig

    def merge(self, deltas: Deltas) -> Iterator[tuple[str, Tensor]]:
        weights = self.config.weights_of(len(deltas))
        for name in names_in(deltas):
            parts = [
                (weight, delta[name]) for weight, delta in zip(weights, deltas, strict=True) if name in delta
            ]
            yield name, (self.config.strength * weighted_sum(parts)).float()
