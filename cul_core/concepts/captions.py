"""Anchor prompts: captions of pictures that must stay as they are, chosen by what is forgotten and by the
model's family."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.family import MINI, Family
from .concept import Concept, display_name

_SUBJECTS = (
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
)
_STYLE_TEMPLATES = (
    "A painting of {subject}.",
    "An image of {subject}.",
    "A picture of {subject}.",
    "A drawing of {subject}.",
    "A painting of {subject} with a blue sky.",
    "A large painting of {subject}.",
    "An artwork showing {subject}.",
    "A painting of {subject}, seen from afar.",
)
_SUBJECT_TEMPLATES = (
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
)


def anchor_prompts(family: Family, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Captions for one request: for styles, varied pictures in no style; for a memorized picture, its anchor;
    else of the anchor word."""
    if family == MINI:
        from ..minicanvas.world import NAMED_TEMPLATES, OBJECTS, PLAIN_TEMPLATES, STYLE_BY_NAME, styles_in

        styled, subjects = PLAIN_TEMPLATES, OBJECTS
        styles = [STYLE_BY_NAME[name].display_name for name in styles_in("declared")]
        in_styles = [
            NAMED_TEMPLATES[i % len(NAMED_TEMPLATES)].replace("{style}", style)
            for i, style in enumerate(styles * 2)
        ]
        pictured = (*PLAIN_TEMPLATES, *in_styles)
    else:
        styled, pictured, subjects = _STYLE_TEMPLATES, _SUBJECT_TEMPLATES, _SUBJECTS
    prompts = []
    for concept in concepts:
        if concept.kind == "style":
            prompts += [
                template.format(subject=name, object=name) for template in styled for name in subjects
            ]
        elif concept.kind == "memorized":
            prompts.append(concept.anchor)
        else:
            anchor = display_name(concept.anchor)
            prompts += [template.format(anchor=anchor, object=anchor) for template in pictured]
    return tuple(dict.fromkeys(prompts))
