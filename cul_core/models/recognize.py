"""Recognition of a checkpoint file's model family."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..base.errors import ModelError
from ..files.safetensors_format import opened, read_header
from . import families as families  # registers them
from .families.unet_layout import VAE_PREFIX, refusal
from .family import FAMILIES, Family, Shapes
from .text_layout import check_text_encoders


def family_of(shapes: Shapes, file_name: str) -> Family:
    """The family of a checkpoint, from the shapes of its tensors by key.

    Raises:
        ModelError: no registered family recognizes the checkpoint, or its family cannot edit it.
    """
    for family in FAMILIES.values():
        if family.recognize(family, shapes, file_name):
            return family
    raise refusal(shapes, file_name)


def detect_family(path: Path) -> Family:
    """The family of a checkpoint file, in the file's variant (epsilon- or v-prediction).

    Raises:
        ModelError: see `family_of` and `check_text_encoders`; or the weights are stored in another dtype than
            fp16, bf16 or fp32.
    """
    header, _, _ = read_header(path)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    family = family_of(shapes, path.name)
    check_text_encoders(family, shapes, path.name)
    if family.has_decoder and not any(name.startswith(VAE_PREFIX) for name in shapes):
        raise ModelError(
            f"{path.name!r} has no VAE, which {family.display_name} needs; choose a complete checkpoint."
        )
    dtypes = {entry["dtype"] for name, entry in header.items() if name.startswith(family.prefix)}
    if other := sorted(dtypes - {"F16", "BF16", "F32"}):
        is_wide = other[0] == "F64"
        width = f"8 bits ({other[0]})" if other[0].startswith("F8") else other[0]
        reason = "is not supported" if is_wide else "cannot hold what a step changes"
        raise ModelError(
            f"{path.name!r} stores its UNet in {width}, which {reason}; choose the fp16, bf16 or fp32 "
            "checkpoint."
        )

    def read(name: str) -> Tensor:
        with opened(path) as file:
            return file.get_tensor(name)

    return family.variant(family, header, read)


def stored_dtypes(path: Path, family: Family) -> str:
    """Dtypes in which a checkpoint stores its network, such as "fp16" or "fp16 and fp32"."""
    header, _, _ = read_header(path)
    dtypes = {entry["dtype"] for name, entry in header.items() if name.startswith(family.prefix)}
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    return " and ".join(sorted(names.get(dtype, dtype) for dtype in dtypes))
