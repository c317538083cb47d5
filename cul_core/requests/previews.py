"""Prompts of the previews that show a request in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..concepts.concept import Concept
from .request import Request


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


def _spread(items: Sequence[str], count: int) -> Sequence[str]:
    return items[:: max(len(items) // count, 1)][:count]
