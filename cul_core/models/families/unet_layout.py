"""Checkpoints in Stable Diffusion's layout: key prefixes, roles of the UNet's weights, and recognition."""

from __future__ import annotations

from ...base.errors import ModelError
from ..family import Family, Shapes, supported

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."

ROLES = {
    "text_readers": r"\.attn2\.to_[kv]\.weight$",  # ESD: esd-x-strict; CUIG: kv-xattn
    "cross_attention": r"\.attn2\.",
    "attention": r"\.attn[12]\.to_(q|k|v|out)\b",  # CUIG calls this xattn
    "no_cross_attention": r"^(?!.*\.attn2\.)",
    "all": r"",
}
_UNSUPPORTED = {(384, 1280): "the Stable Diffusion XL refiner"}


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
        ModelError: the UNet has the signature, but also takes an image, or has another noise schedule.
    """
    widths = _widths(shapes)
    if widths is None or (widths[0], widths[2]) != family.signature:
        return False
    if widths[1] != family.latent_shape[0]:
        raise ModelError(
            f"{file_name!r} has a UNet with {widths[1]} input channels, where {family.display_name} has "
            f"{family.latent_shape[0]}: inpainting and other models that also take an image cannot be "
            "edited; choose the text-to-image checkpoint."
        )
    is_pooled = any(kind.is_pooled for kind in family.text_encoders)
    if f"{UNET_PREFIX}label_emb.0.0.weight" in shapes and not is_pooled:
        raise ModelError(
            f"{file_name!r} is an unCLIP checkpoint, whose UNet also takes an image embedding and cannot be "
            "edited; choose the text-to-image checkpoint."
        )
    if any(name.startswith("edm_") for name in shapes):
        raise ModelError(
            f"{file_name!r} is trained with the noise schedule of EDM, which is not supported; choose a "
            f"checkpoint with the schedule of {family.display_name}."
        )
    return True


def refusal(shapes: Shapes, file_name: str) -> ModelError:
    """The error for a checkpoint that no family recognizes."""
    widths = _widths(shapes)
    if widths is None:
        return ModelError(
            f"{file_name!r} holds no Stable Diffusion UNet (no matching {UNET_PREFIX!r} tensors); choose a "
            f"full checkpoint of a supported family: {supported()}."
        )
    known = _UNSUPPORTED.get((widths[0], widths[2]))
    architecture = f" ({known})" if known else ""
    return ModelError(
        f"{file_name!r} has UNet width {widths[0]} and text width {widths[2]}{architecture}, "
        f"which is no supported architecture; choose a checkpoint of: {supported()}."
    )
