"""Checkpoints in Stable Diffusion's layout: key prefixes, roles of the UNet's weights, and recognition."""

from __future__ import annotations

import re

from ...base.errors import ModelError, brief_repr
from ..family import Family, Shapes, supported
from ..sd_layout import unet_shapes

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."

ROLES = {
    "text_readers": r"\.attn2\.to_[kv]\.weight$",  # ESD: esd-x-strict; CUIG: kv-xattn
    # label_emb reads the pooled vector before the image's sizes
    "text_inputs": r"\.attn2\.to_[kv]\.weight$|\.label_emb\.0\.0\.weight$",
    "cross_attention": r"\.attn2\.",
    "attention": r"\.attn[12]\.to_(q|k|v|out)\b",  # CUIG calls this xattn
    "no_cross_attention": r"^(?!.*\.attn2\.)",
    "all": r"",
}
_UNSUPPORTED = {(384, 1280): "the Stable Diffusion XL refiner"}
_TAKING_IMAGES = {9: "inpainting", 8: "InstructPix2Pix", 5: "depth-to-image", 7: "an upscaler"}
"""Input channels of a UNet -> what such a model is."""
_RELATIVES = {
    (6, 12, 0, 22): "SSD-1B, a pruned Stable Diffusion XL",
    (6, 6, 0, 9): "Segmind-Vega, a pruned Stable Diffusion XL",
    (3, 7, 0, 14): "KOALA-700M, a pruned Stable Diffusion XL",
    (3, 8, 6, 16): "KOALA-1B, a pruned Stable Diffusion XL",
    (4, 3, 1, 6): "base-SD (BK-SDM-Base), a pruned Stable Diffusion",
    (4, 3, 0, 6): "small-SD (BK-SDM-Small), a pruned Stable Diffusion",
    (3, 3, 0, 6): "tiny-SD (BK-SDM-Tiny), a pruned Stable Diffusion",
}
"""(residual blocks going down, transformer blocks going down, in the middle, going up) -> name."""
_OTHER_FILES = {
    r"(^|\.)joint_blocks\.": "a model of the Stable Diffusion 3 architecture",
    r"(^|\.)double_blocks\.": "a model of the Flux architecture",
    r"\.lora_(up|down|A|B)\.|\.lokr_|\.hada_": "a LoRA",
    r"^input_blocks\.0\.0\.weight$": "a UNet alone, without its text encoder",
    r"^(unet\.)?down_blocks\.0\.": "a UNet in diffusers' layout",
    r"^(encoder|decoder)\.conv_in\.weight$": "a VAE alone",
    r"^(text_model|transformer\.text_model)\.": "a text encoder alone",
    r"^control_model\.|^controlnet_": "a ControlNet",
}
"""Pattern of a key -> what a file with such keys is."""


def _widths(shapes: Shapes) -> tuple[int, int, int] | None:
    """(width, input channels, width of the text rows) of a checkpoint's UNet; None if it has none."""
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    names = (name for name in sorted(shapes) if name.startswith(UNET_PREFIX))
    context = next((shapes[name] for name in names if name.endswith("attn2.to_k.weight")), None)
    if first is None or context is None or len(first) != 4 or len(context) != 2:
        return None
    return first[0], first[1], context[1]


def is_unet(shapes: Shapes) -> bool:
    """Whether a checkpoint with these shapes has a UNet in Stable Diffusion's layout, of whatever size."""
    return f"{UNET_PREFIX}input_blocks.0.0.weight" in shapes


def recognize(family: Family, shapes: Shapes, file_name: str) -> bool:
    """Whether a checkpoint with these shapes has a text-to-image UNet with the family's signature.

    Raises:
        ModelError: the UNet has the signature, but also takes an image, has another noise schedule, or has
            other tensors than the family's.
    """
    widths = _widths(shapes)
    if widths is None or (widths[0], widths[2]) != family.signature:
        return False
    if widths[1] != family.latent_shape[0]:
        known = _TAKING_IMAGES.get(widths[1])
        kind = f" ({known})" if known else ""
        raise ModelError(
            f"{file_name!r} has a UNet with {widths[1]} input channels{kind}, where {family.display_name} "
            f"has {family.latent_shape[0]}: inpainting and other models that also take an image cannot be "
            "edited; choose the text-to-image checkpoint."
        )
    is_pooled = any(kind.is_pooled for kind in family.text_encoders)
    if f"{UNET_PREFIX}label_emb.0.0.weight" in shapes and not is_pooled:
        raise ModelError(
            f"{file_name!r} is an unCLIP checkpoint, whose UNet also takes an image embedding and cannot be "
            "edited; choose the text-to-image checkpoint."
        )
    if any(name.startswith("edm_") for name in shapes):
        known = "Playground v2.5" if "edm_mean" in shapes else "such as CosXL"
        raise ModelError(
            f"{file_name!r} is trained with the noise schedule of EDM ({known}), which is not supported; "
            f"choose a checkpoint with the schedule of {family.display_name}."
        )
    _check_unet(family, shapes, file_name)
    return True


def _check_unet(family: Family, shapes: Shapes, file_name: str) -> None:
    """Raises ModelError if the UNet's names and shapes are not all those of the family."""
    if not family.has_config("unet"):  # a family that no network is built of here
        return
    wanted = {UNET_PREFIX + name: shape for name, shape in unet_shapes(family.config("unet")).items()}
    found = {name: tuple(shape) for name, shape in shapes.items() if name.startswith(UNET_PREFIX)}
    if found == wanted:
        return
    if relative := _RELATIVES.get(_blocks(found)):
        raise ModelError(
            f"{file_name!r} is {relative}, which is not supported; choose a checkpoint of "
            f"{family.display_name} itself."
        )
    if f"{UNET_PREFIX}time_embed.cond_proj.weight" in found:
        raise ModelError(
            f"{file_name!r} is a latent consistency model (LCM), whose UNet also takes the guidance scale "
            f"and is not supported; choose the checkpoint of {family.display_name} it was made from."
        )
    raise ModelError(
        f"{file_name!r} is not a {family.display_name} as it is known: {_first_difference(found, wanted)}."
    )


def _first_difference(found: Shapes, wanted: Shapes) -> str:
    """What differs first between two sets of shapes, with the remedy."""
    if missing := sorted(wanted.keys() - found.keys()):
        return (
            f"its UNet lacks {missing[0]!r}{_and_others(missing)}; choose a complete checkpoint, or "
            "download it again"
        )
    if more := sorted(found.keys() - wanted.keys()):
        return (
            f"its UNet also has {brief_repr(more[0])}{_and_others(more)}; load it with ComfyUI's own "
            "loaders and connect them to Unlearn From MODEL, which takes what ComfyUI uses"
        )
    name = next(name for name in sorted(wanted) if found[name] != wanted[name])
    return f"{name!r} has the shape {found[name]} where {wanted[name]} is known; choose another checkpoint"


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def _blocks(shapes: Shapes) -> tuple[int, int, int, int]:
    """The key of `_RELATIVES` that a UNet has."""
    counts = {"input": 0, "middle": 0, "output": 0}
    for name in shapes:
        if match := re.search(r"\.(input|middle|output)_blocks?\..*\.attn2\.to_k\.weight$", name):
            counts[match[1]] += 1
    residual = sum(bool(re.search(r"\.input_blocks\.\d+\.0\.in_layers\.0\.weight$", name)) for name in shapes)
    return (residual, *counts.values())


def refusal(shapes: Shapes, file_name: str) -> ModelError:
    """The error for a checkpoint that no family recognizes."""
    widths = _widths(shapes)
    if widths is None:
        kinds = (what for pattern, what in _OTHER_FILES.items() if any(re.search(pattern, n) for n in shapes))
        known = next(kinds, None)
        return ModelError(
            f"{file_name!r} {f'is {known} and ' if known else ''}holds no Stable Diffusion UNet (no "
            f"matching {UNET_PREFIX!r} tensors); choose a full checkpoint of a supported family: "
            f"{supported()}."
        )
    known = _UNSUPPORTED.get((widths[0], widths[2]))
    architecture = f" ({known})" if known else ""
    return ModelError(
        f"{file_name!r} has UNet width {widths[0]} and text width {widths[2]}{architecture}, "
        f"which is no supported architecture; choose a checkpoint of: {supported()}."
    )
