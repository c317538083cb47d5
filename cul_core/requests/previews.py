"""Previews of a step in training: their prompts, their sampler, and the interval between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..concepts.concept import Concept
from ..models.sampling import SamplerConfig
from .request import Request

PREVIEW_SAMPLER = SamplerConfig(steps=8)
_LARGEST_SHARE = 1 / 20
_TRAINED = 3
"""Predictions that one with gradients takes as long as: the backward pass is twice the forward one."""


def preview_prompts(request: Request) -> list[tuple[str, str]]:
    """(label, prompt) pairs to preview while a request trains: its first targets, and concepts to retain.

    Anchor prompts stand in where the request retains no concept.
    """
    first = request.concepts[0]

    def shown(role: str, concept: Concept, count: int) -> list[tuple[str, str]]:
        rewritten = [
            prompts[0] for caption in request.anchor_prompts if (prompts := concept.target_prompts(caption))
        ]
        return [(f"{role}\n{concept.name}", prompt) for prompt in _spread(rewritten, count)]

    targets = request.concepts[:2]
    stay = [
        replace(concept, anchor=concept.anchor or first.anchor)
        for concept in request.retain
        if concept.name != first.anchor
    ]
    kept = [pair for concept in stay[:2] for pair in shown("keep", concept, 1)]
    return [pair for concept in targets for pair in shown("forget", concept, 3 - len(targets))] + (
        kept or [("anchor", prompt) for prompt in _spread(request.anchor_prompts, 2)]
    )


def preview_interval(request: Request, wanted: int, count: int) -> int:
    """Updates between previews of `count` prompts: as many as wanted, or more, so that a preview takes at
    most a twentieth of the predictions that the updates since the last one took; 0 stays 0, none at all."""
    update = sum(_TRAINED * cost.student_images + cost.teacher_images for cost in request.costs())
    guided = 1 if PREVIEW_SAMPLER.guidance_scale == 1 else 2
    preview = count * PREVIEW_SAMPLER.steps * guided
    return max(wanted, math.ceil(preview / (_LARGEST_SHARE * max(update, 1)))) if wanted else 0


def _spread(items: Sequence[str], count: int) -> Sequence[str]:
    return items[:: max(len(items) // count, 1)][:count]
