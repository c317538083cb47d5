"""TRCE's first stage: the EOS rows of target prompts become those of anchor prompts, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base.config import Config, setting
from ..parts.text_maps import TextMap, damped, ridge_map
from .base import METHODS
from .closed_form import ClosedForm, Problem

_CAPTIONS = 15
"""Captions in which each concept stands beside its anchor; the reference has 15 templates."""
_DAMPING = 1e-9
"""Share of the mean variance that is added to every direction, against rounding."""


@dataclass(frozen=True)
class TRCETextConfig(Config):
    """Settings of `TRCEText`, which all requests of a chain share."""

    keep_weight: float = setting(
        0.02,
        "Weight of the captions' text (mu): more keeps more and forgets less. The reference has 0.02 for "
        "several concepts and 0.01 for one.",
        minimum=1e-9,
        maximum=1e6,
    )
    SHARED: ClassVar[tuple[str, ...]] = ("keep_weight",)


@METHODS.register(
    "trce_text",
    config=TRCETextConfig,
    display_name="TRCE Text Stage",
    description="Maps the end-of-text row of prompts with a name onto that of the same prompts with its "
    "anchor, by one regression over all requests so far, without training: the first of TRCE's two stages. "
    "Each request can be taken back.",
    paper="TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models, arXiv "
    "2503.07389",
)
class TRCEText(ClosedForm):
    """W' = W0 (I + M) with the least mean squared error over EOS rows and captions (`text_maps.ridge_map`).

    With EOS rows c_r of N target prompts, EOS rows v_r of the prompts that they should become, and the sum
    K0 of x x^T over all text rows x of a caption, in the mean over captions, M = R (P + mu K0)^-1, where
    R = sum_r (v_r - c_r) c_r^T / N and P = sum_r c_r c_r^T / N. The reference's captions are 30,000 of COCO.
    Here they are the anchor prompts, and sentences with the names to keep; their K0 is damped a little, since
    few captions leave it nearly singular.
    """

    config: TRCETextConfig

    def fit(self, problem: Problem) -> TextMap:
        rows, source = problem.rows, problem.source
        pairs = [
            rows.prompts(concept, request.anchor_prompts, _CAPTIONS) for concept, request in problem.named
        ]
        targets, goals = (
            torch.stack([words[-1] for prompts in side for words in rows.words(source, prompts)])
            for side in zip(*pairs, strict=True)
        )
        captions = [*rows.sentences(problem.kept), *problem.captions]
        kept = rows.mean_squares(source, captions)
        mean = len(targets) ** -0.5
        return ridge_map(mean * targets, mean * goals, self.config.keep_weight * damped(kept, _DAMPING))
