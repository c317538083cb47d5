"""Layouts in which checkpoints hold text encoders, compared with what a family needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..base.errors import ModelError
from .family import Family, Shapes, TextEncoder
from .sd_layout import clip_shapes, open_clip_shapes

HUGGING_FACE = "transformer.text_model."
"""Level of the names of an OpenCLIP encoder that a file holds as transformers names it."""
_REMEDY = (
    "load the checkpoint and a fitting CLIP with ComfyUI's own loaders and connect both to Unlearn From MODEL"
)


def prefix_in(kind: TextEncoder, names: Collection[str]) -> str:
    """The prefix under which a checkpoint with these names holds a text encoder."""
    prefixes = (kind.prefix, *kind.other_prefixes)
    return next((prefix for prefix in prefixes if any(n.startswith(prefix) for n in names)), kind.prefix)


def text_shapes(kind: TextEncoder, config: Mapping[str, Any], names: Collection[str]) -> dict[str, tuple]:
    """Checkpoint key -> shape of all tensors of a text encoder, in the layout that the checkpoint has.

    Args:
        kind: the text encoder.
        config: its constructor arguments.
        names: all keys of the checkpoint.
    """
    prefix = prefix_in(kind, names)
    level, shapes = "", clip_shapes(config)
    if not kind.is_open_clip:
        level = "text_model." if any(name.startswith(f"{prefix}text_model.") for name in names) else ""
    elif f"{prefix}{HUGGING_FACE}embeddings.token_embedding.weight" in names:
        level = HUGGING_FACE
    else:
        shapes = open_clip_shapes(config)
    wanted = {f"{prefix}{level}{name}": shape for name, shape in shapes.items()}
    if kind.is_pooled:
        width = config["hidden_size"]
        places = [f"{prefix}{name}" for name in ("text_projection", *TURNED)]
        wanted[next((place for place in places if place in names), places[0])] = (width, width)
    return wanted


TURNED = ("text_projection.weight", "transformer.text_projection.weight")
"""Names of the projection as transformers holds it: the transpose of OpenCLIP's."""


def check_text_encoders(family: Family, shapes: Shapes, file_name: str) -> None:
    """Check that a checkpoint holds the family's text encoders.

    Raises:
        ModelError: one is missing, incomplete, or of other shapes.
    """
    for number, kind in enumerate(family.text_encoders, 1):
        if not family.has_config(kind.config):  # a family that no encoder is built of here
            continue
        which = f"text encoder {number}" if len(family.text_encoders) > 1 else "text encoder"
        wanted = text_shapes(kind, family.config(kind.config), shapes.keys())
        missing = sorted(wanted.keys() - shapes.keys())
        if len(missing) == len(wanted):
            raise ModelError(
                f"{file_name!r} has no {which} (no tensors {kind.prefix!r}...), which {family.display_name} "
                f"needs; {_REMEDY}."
            )
        if missing:
            raise ModelError(
                f"{file_name!r} lacks {missing[0]!r} of its {which}"
                f"{f' and {len(missing) - 1} more tensors' if missing[1:] else ''}; {_REMEDY}."
            )
        for name, shape in wanted.items():
            if tuple(shapes[name]) != shape:
                raise ModelError(
                    f"{file_name!r} has {name!r} of its {which} in the shape {tuple(shapes[name])}, where "
                    f"{family.display_name} has {shape}; {_REMEDY}."
                )


def is_read_whole(kind: TextEncoder, config: Mapping[str, Any], key: str) -> bool:
    """Whether every prompt depends on a text encoder's tensor.

    Of the token embeddings a prompt reads a few rows, and nothing reads what follows the hidden state that
    the network takes.
    """
    if key.endswith("token_embedding.weight"):
        return False
    if not kind.skips_last or kind.is_pooled:
        return True
    layer = re.search(r"\.(?:layers|resblocks)\.(\d+)\.", key)
    is_last = layer is not None and int(layer[1]) == config["num_hidden_layers"] - 1
    return not is_last and not re.search(r"\.(final_layer_norm|ln_final)\.", key)
