"""The model families we can edit: geometry, prediction type, network configs, and how to recognize them in a
file.

The configs of a family are small JSON files in `configs/<name>/`, so that loading needs nothing but the
checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..base.errors import ModelError
from ..files.safetensors_format import opened, read_header
from .family import FAMILIES, UNET_PREFIX, V_PREDICTION, Family

_UNSUPPORTED = {(384, 1280): "the Stable Diffusion XL refiner"}


def family_of(shapes: dict[str, tuple[int, ...]], file_name: str) -> Family:
    """The family of a checkpoint, from the shapes of two of its tensors.

    Raises:
        ModelError: not a Stable Diffusion checkpoint layout, an architecture or noise schedule without an
            entry here, or a UNet that takes more than latents and text (inpainting, unCLIP).
    """
    supported = ", ".join(family.display_name for family in FAMILIES.values())
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    context = next(
        (
            shape
            for name, shape in sorted(shapes.items())
            if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight")
        ),
        None,
    )
    if first is None or context is None or len(first) != 4 or len(context) != 2:
        raise ModelError(
            f"{file_name!r} holds no Stable Diffusion UNet (no fitting {UNET_PREFIX!r} tensors); choose a "
            f"full checkpoint of a supported family: {supported}."
        )
    found = (first[0], context[1])
    for family in FAMILIES.values():
        if family.signature == found:
            if first[1] != family.latent_shape[0]:
                raise ModelError(
                    f"{file_name!r} has a UNet with {first[1]} input channels, where {family.display_name} "
                    f"has {family.latent_shape[0]}: inpainting and other models that also take a picture "
                    "cannot be edited; choose the text-to-image checkpoint."
                )
            if f"{UNET_PREFIX}label_emb.0.0.weight" in shapes and not any(
                kind.is_pooled for kind in family.text_encoders
            ):
                raise ModelError(
                    f"{file_name!r} is an unCLIP checkpoint, whose UNet also takes a picture's embedding and "
                    "cannot be edited; choose the text-to-image checkpoint."
                )
            if any(name.startswith("edm_") for name in shapes):
                raise ModelError(
                    f"{file_name!r} is trained with the noise schedule of EDM, which is not supported; "
                    f"choose a checkpoint with the schedule of {family.display_name}."
                )
            return family
    known = f" ({_UNSUPPORTED[found]})" if found in _UNSUPPORTED else ""
    raise ModelError(
        f"{file_name!r} has UNet width {found[0]} and text width {found[1]}{known}, which is no supported "
        f"architecture; choose a checkpoint of: {supported}."
    )


_SPREAD = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def detect_family(path: Path) -> Family:
    """The family of a checkpoint file (see `families.family_of`), and what its network predicts.

    Shapes do not tell the latter. It is told as ComfyUI tells it: for Stable Diffusion XL by empty tensors
    named `v_pred` and `ztsnr`, for 2.x by how far the values of one tensor are spread.

    Raises:
        ModelError: see `families.family_of`; or the UNet is stored in another precision than fp16, bf16 and
        fp32.
    """
    header, _, _ = read_header(path)
    family = family_of({name: tuple(entry["shape"]) for name, entry in header.items()}, path.name)
    dtypes = {entry["dtype"] for name, entry in header.items() if name.startswith(UNET_PREFIX)}
    if other := sorted(dtypes - {"F16", "BF16", "F32"}):
        width = "8 bits (" * other[0].startswith("F8") + other[0] + ")" * other[0].startswith("F8")
        raise ModelError(
            f"{path.name!r} stores its UNet in {width}, which cannot hold what a step changes; choose the "
            "fp16, bf16 or fp32 checkpoint."
        )
    if family.name == "sdxl" and "v_pred" in header:
        return replace(V_PREDICTION["sdxl"], ends_in_noise="ztsnr" in header)
    if family.name == "sd2" and _SPREAD in header:
        with opened(path) as file:
            if file.get_tensor(_SPREAD).float().std(correction=0) > 0.09:
                return V_PREDICTION["sd2"]
    return family


def unet_dtypes(path: Path) -> str:
    """In what precision a checkpoint's UNet is stored, such as "fp16" or "fp16 and fp32"."""
    header, _, _ = read_header(path)
    found = {entry["dtype"] for name, entry in header.items() if name.startswith(UNET_PREFIX)}
    return " and ".join(
        sorted({"F16": "fp16", "BF16": "bf16", "F32": "fp32"}.get(dtype, dtype) for dtype in found)
    )
