"""TIES merging: trim each model's change, elect a sign per weight, and merge what agrees with it."""

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

    Strength and kept fraction are theirs for the first requests; their strengths grow with the number of
    requests, since the mean dilutes each: 1.25 for two or three, 1.75 for about five, 2.75 for eleven.
    """

    strength: float = setting(
        1.25,
        "Multiplies the merged change (lambda). The mean dilutes each request, so that more models need "
        "more: 1.25 for two or three, 1.75 for about five, 2.75 for eleven.",
        minimum=0.0,
        maximum=100.0,
    )
    keep_fraction: float = setting(
        0.8,
        "Share of each model's changed values that is kept, the largest ones (kappa).",
        minimum=0.0,
        maximum=1.0,
    )
    trim: str = setting(
        "tensor",
        "tensor: each weight matrix keeps that share of its own values, as in the reference. global: the "
        "model keeps that share of all its values, as in the TIES paper.",
        choices=("tensor", "global"),
    )
    function: str = setting(
        "mean",
        "What becomes of the values that agree in sign: their mean, their sum, or the largest of them.",
        choices=("mean", "sum", "max"),
    )
    keep_one_more: bool = setting(False, "Keep one value more than the fraction says, as the reference does.")
    REFERENCE: ClassVar[dict] = {"keep_one_more": True}


@MERGERS.register(
    "ties",
    config=TiesConfig,
    display_name="TIES",
    description="Keeps the largest changes of each model, elects a sign per weight, and averages the "
    "changes that have it.",
    paper="Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708",
)
class Ties(Merger):
    """W = W0 + strength * disjoint_merge(elect(trim(tau_i))), (Yadav et al., algorithm 1).

    Trimming sees the deltas before their weights, which changes nothing: a weight scales all of a model's
    values alike. Where the kept values cancel, the sign of the majority is elected: of one tensor's signs if
    trimming is per tensor, of all if it is global. Where that is a tie as well, no sign is elected and
    nothing is merged, so that negated models merge to the negated result (the reference takes the negative
    values).
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
    """-1, 0 or 1 per entry of `total`, the sum of the trimmed deltas, same shape; zeros take the sign of
    `majority`.

    That is the sum of all signs, of this tensor if it is not given; if it is 0, zeros stay zeros.
    """
    signs = total.sign()
    majority = int(signs.sum()) if majority is None else majority
    return torch.where(signs == 0, float((majority > 0) - (majority < 0)), signs)


def merge_agreeing(parts: Sequence[tuple[float, Tensor]], signs: Tensor, function: str) -> Tensor:
    """Mean, sum or largest (`function`) of the weighted entries that have the elected sign, in fp64, same
    shape; 0 where none has."""
    result, count = torch.zeros_like(signs), torch.zeros_like(signs)
    for weight, tensor in parts:
        magnitude = (weight * tensor.double() * signs).clamp(min=0)
        result = torch.maximum(result, magnitude) if function == "max" else result + magnitude
        count += magnitude > 0
    merged = signs * (result / count.clamp(min=1) if function == "mean" else result)
    return merged + 0.0  # -0.0, which has other bytes, becomes 0.0
