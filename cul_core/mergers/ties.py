"""TIES merging: trim each delta, elect a sign per weight, merge the entries with the elected sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import setting
from ..base.topk import count_of_fraction, top_k
from .base import MERGERS, Deltas, Merger, WeightedConfig, names_in, weighted_sum


@dataclass(frozen=True)
class TiesConfig(WeightedConfig):
    """`reference` is what the authors of the continual unlearning benchmark ran; the defaults are ours.

    Default strength and kept fraction are the authors' for two or three requests. Their strength grows with
    the number of requests, because the mean dilutes each: 1.75 for about five, 2.75 for eleven.
    """

    strength: float = setting(
        1.25,
        "Factor of the merged change (lambda). The mean dilutes each request: 1.25 suits two or three "
        "models, 1.75 about five, 2.75 eleven.",
        minimum=0.0,
        maximum=100.0,
    )
    keep_fraction: float = setting(
        0.8,
        "Share of each model's changed values to keep, the largest ones (kappa).",
        minimum=0.0,
        maximum=1.0,
    )
    trim: str = setting(
        "tensor",
        "Values among which a model's largest are kept. tensor: those of each weight matrix, as in the "
        "reference. global: all of the model's, as in the TIES paper.",
        choices=("tensor", "global"),
    )
    function: str = setting(
        "mean",
        "How values with the elected sign are merged: their mean, their sum, or the largest (max).",
        choices=("mean", "sum", "max"),
    )
    keep_one_more: bool = setting(False, "Keep one value more than the fraction says, as the reference does.")
    REFERENCE: ClassVar[dict] = {"keep_one_more": True}


@MERGERS.register(
    "ties",
    config=TiesConfig,
    display_name="TIES",
    description="Keeps the largest changes of each model, elects a sign per weight, and averages the "
    "changes with that sign.",
    paper="Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708",
)
class Ties(Merger):
    """W = W0 + strength * disjoint_merge(elect(trim(tau_i))) (Yadav et al., algorithm 1).

    Deltas are trimmed before they are weighted; the order does not matter, because a weight scales all values
    of a model alike. Where the trimmed values cancel, the majority sign is elected: that of the tensor if
    trimming is per tensor, that of all tensors if it is global. If the majority is a tie too, no sign is
    elected and the merged value is 0, so negated models merge to the negated result. (The reference takes the
    negative values.)
    """

    config: TiesConfig

    def merge(self, deltas: Deltas) -> Iterator[tuple[str, Tensor]]:
        config, names, weights = self.config, names_in(deltas), self.config.weights_of(len(deltas))
        cuts, majority = None, None
        if config.trim == "global":
            size = sum(next(delta[name] for delta in deltas if name in delta).numel() for name in names)
            cuts = [top_k(delta, self._kept(size)) for delta in deltas]

        def trimmed(name: str) -> list[tuple[float, Tensor]]:
            parts = []
            for number, delta in enumerate(deltas):
                if name in delta:
                    tensor = delta[name]
                    cut = cuts[number] if cuts else top_k({name: tensor}, self._kept(tensor.numel()))
                    parts.append((weights[number], tensor * cut.mask(name, tensor)))
            return parts

        if cuts:
            majority = int(sum(weighted_sum(trimmed(name)).sign().sum() for name in names))
        for name in names:
            parts = trimmed(name)
            yield (
                name,
                (
                    config.strength
                    * merge_agreeing(parts, elect_signs(weighted_sum(parts), majority), config.function)
                ).float(),
            )

    def _kept(self, size: int) -> int:
        return count_of_fraction(self.config.keep_fraction, size) + self.config.keep_one_more


def elect_signs(total: Tensor, majority: int | None = None) -> Tensor:
    """The elected sign per entry, -1, 0 or 1 as fp64, in the shape of `total`.

    Args:
        total: weighted sum of the trimmed deltas.
        majority: sum of the signs that decides where `total` is 0; this tensor's if it is not given. A
            majority of 0 leaves these entries 0.
    """
    signs = total.sign()
    majority = int(signs.sum()) if majority is None else majority
    return torch.where(signs == 0, float((majority > 0) - (majority < 0)), signs)


def merge_agreeing(parts: Sequence[tuple[float, Tensor]], signs: Tensor, function: str) -> Tensor:
    """Merged values in fp64, in the shape of `signs`: 0 where no entry has the elected sign.

    Args:
        parts: (weight, trimmed delta) per model.
        signs: elected sign per entry.
        function: `mean`, `sum` or `max` of the weighted entries with the elected sign.
    """
    result, count = torch.zeros_like(signs), torch.zeros_like(signs)
    for weight, tensor in parts:
        magnitude = (weight * tensor.double() * signs).clamp(min=0)
        result = torch.maximum(result, magnitude) if function == "max" else result + magnitude
        count += magnitude > 0
    merged = signs * (result / count.clamp(min=1) if function == "mean" else result)
    return merged + 0.0  # turns -0.0 into 0.0: the bytes differ, and so would the content hash
