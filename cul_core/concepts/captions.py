"""Anchor prompts: captions of images that must stay unchanged, for the concepts of a request."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.family import Captions, Family
from .concept import Concept, display_name

_CAPTIONS = Captions(
    for_styles=(
        "A painting of {subject}.",
        "An image of {subject}.",
        "A picture of {subject}.",
        "A drawing of {subject}.",
        "A painting of {subject} with a blue sky.",
        "A large painting of {subject}.",
        "An artwork showing {subject}.",
        "A painting of {subject}, seen from afar.",
    ),
    subjects=(
        "a mountain lake",
        "a village street",
        "a bowl of fruit",
        "a sailing boat",
        "an old house",
        "a vase of flowers",
        "a forest path",
        "a woman reading",
        "a man with a hat",
        "a field in summer",
        "a harbour",
        "a bridge over a river",
        "a garden",
        "a horse",
        "a cat on a chair",
        "a castle on a hill",
        "a market",
        "a child playing",
        "a road through hills",
        "a church",
        "a stormy sea",
        "a table by a window",
        "a flock of birds",
        "a city at night",
        "a snowy roof",
    ),
    for_others=(
        "a photo of a {anchor}",
        "an image of a {anchor}",
        "a picture of a {anchor}",
        "a painting of a {anchor}",
        "one {anchor}",
        "a close-up of a {anchor}",
        "a {anchor} in the morning light",
        "a {anchor} in front of a wall",
        "a {anchor} outdoors",
        "a {anchor} in a room",
        "a black and white photo of a {anchor}",
        "a drawing of a {anchor}",
        "a portrait of a {anchor}",
        "a {anchor} seen from the side",
        "a {anchor} in the city",
        "a small picture of a {anchor}",
    ),
)


def anchor_prompts(family: Family, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Distinct anchor prompts for one request.

    A style gives captions of varied images in no style, a memorized image its anchor caption, every other
    concept captions of its anchor word.

    Args:
        family: the model's family, whose own caption templates are used if it has any.
        concepts: what the request forgets.
    """
    captions, prompts = family.captions or _CAPTIONS, []
    for concept in concepts:
        if concept.kind == "style":
            prompts += [
                template.format(subject=name)
                for template in captions.for_styles
                for name in captions.subjects
            ]
        elif concept.kind == "memorized":
            prompts.append(concept.anchor)
        else:
            prompts += [
                template.format(anchor=display_name(concept.anchor)) for template in captions.for_others
            ]
    return tuple(dict.fromkeys(prompts))
