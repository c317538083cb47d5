"""MiniCanvas as a model family. It is registered here, so that no room below this one names it."""

from __future__ import annotations

from pathlib import Path

from ..models.families.unet_layout import ROLES, TEXT_PREFIX, UNET_PREFIX, recognize
from ..models.family import Captions, Family, TextEncoder, register
from .judge import MiniCanvasClassifier
from .world import NAMED_TEMPLATES, OBJECTS, PLAIN_TEMPLATES, STYLE_BY_NAME, styles_in


def _captions() -> Captions:
    """Caption templates: plain images of every object for styles; for objects also every declared style."""
    styles = [STYLE_BY_NAME[name].display_name for name in styles_in("declared")]
    templates = [
        NAMED_TEMPLATES[i % len(NAMED_TEMPLATES)].replace("{style}", style)
        for i, style in enumerate(styles * 2)
    ]
    as_subject = tuple(template.replace("{object}", "{subject}") for template in PLAIN_TEMPLATES)
    as_anchor = tuple(template.replace("{object}", "{anchor}") for template in (*PLAIN_TEMPLATES, *templates))
    return Captions(for_styles=as_subject, subjects=OBJECTS, for_others=as_anchor)


MINI = register(
    Family(
        "mini",
        "MiniCanvas",
        signature=(64, 192),
        latent_shape=(4, 8, 8),
        latent_scale=1.0,
        image_size_px=64,
        sampling_batch=16,
        prefix=UNET_PREFIX,
        roles=ROLES,
        recognize=recognize,
        folder=Path(__file__).parent / "config",
        ships_tokenizer=True,
        has_decoder=True,
        closed_vocabulary=True,
        text_encoders=(TextEncoder(TEXT_PREFIX),),
        captions=_captions(),
        is_small=True,
        classifier=MiniCanvasClassifier,
    )
)
