"""MiniCanvas' worlds as model families, registered here, so that no room below this one names them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..models.families.unet_layout import ROLES, TEXT_PREFIX, UNET_PREFIX, recognize
from ..models.family import Captions, Family, TextEncoder, register
from .judge import MiniCanvasClassifier
from .large import LARGE
from .world import SMALL, World


def _captions(world: World, subjects: tuple[str, ...]) -> Captions:
    """Caption templates: plain images of every object for styles; for objects also every declared style.

    Args:
        world: its templates and declared styles.
        subjects: what the templates' `{object}` becomes for every object.
    """
    styles = [world.style_by_name[name].display_name for name in world.styles_in("declared")]
    named, plain = world.templates.named, world.templates.plain
    templates = [named[i % len(named)].replace("{style}", style) for i, style in enumerate(styles * 2)]
    as_subject = tuple(template.replace("{object}", "{subject}") for template in plain)
    as_anchor = tuple(template.replace("{object}", "{anchor}") for template in (*plain, *templates))
    return Captions(for_styles=as_subject, subjects=subjects, for_others=as_anchor)


def _family(
    name: str, display_name: str, text_width: int, folder: Path, world: World, subjects: tuple[str, ...]
) -> Family:
    return register(
        Family(
            name,
            display_name,
            signature=(64, text_width),
            latent_shape=(4, 8, 8),
            latent_scale=1.0,
            image_size_px=64,
            sampling_batch=16,
            prefix=UNET_PREFIX,
            roles=ROLES,
            recognize=recognize,
            folder=folder,
            ships_tokenizer=True,
            has_decoder=True,
            closed_vocabulary=True,
            text_encoders=(TextEncoder(TEXT_PREFIX),),
            captions=_captions(world, subjects),
            is_small=True,
            classifier=partial(MiniCanvasClassifier, world),
        )
    )


_CONFIG = Path(__file__).parent / "config"
MINI = _family("mini", "MiniCanvas", 192, _CONFIG, SMALL, SMALL.objects)
MINI_LARGE = _family(
    "mini_large",
    "MiniCanvas large",
    256,
    _CONFIG / "large",
    LARGE,
    tuple(LARGE.phrase(name) for name in LARGE.objects),
)
FAMILY_OF = {SMALL.name: MINI, LARGE.name: MINI_LARGE}
"""Family of a world by the world's name."""
