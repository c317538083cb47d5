"""Uniform merging: the mean of the models' deltas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..base.config import Config
from .base import MERGERS, Deltas, Merger, names_in, weighted_sum


@dataclass(frozen=True)
class UniformConfig(Config):
    """The mean has no settings."""


@MERGERS.register(
    "uniform",
    config=UniformConfig,
    display_name="Uniform",
    description="The mean of the models: every request is diluted by the number of models.",
    paper="Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482",
)
class Uniform(Merger):
    """W = W0 + (1/n) sum_i tau_i (Wortsman et al., section 2)."""

    def merge(self, deltas: Deltas) -> Iterator[tuple[str, Tensor]]:
        for name in names_in(deltas):
            yield (
                name,
                (
                    weighted_sum([(1.0, delta[name]) for delta in deltas if name in delta]) / len(deltas)
                ).float(),
            )
