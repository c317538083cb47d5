"""Recognition of a checkpoint file's model family."""

from __future__ import annotations

from pathlib import Path

from ..base.errors import ModelError
from ..files.safetensors_format import OpenedFile, opened, read_header
from . import families as families  # registers them
from .families.unet_layout import refusal
from .family import FAMILIES, Family, Shapes


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
    """The family of a checkpoint file; see `family_in`."""
    with opened(path) as file:
        return family_in(file)


def family_in(file: OpenedFile) -> Family:
    """The family of an open checkpoint file, in the file's variant (epsilon- or v-prediction).

    Raises:
        ModelError: see `family_of`; or the weights are stored in another dtype than fp16, bf16 or fp32.
    """
    family = family_of({name: tuple(entry["shape"]) for name, entry in file.header.items()}, file.name)
    dtypes = {entry["dtype"] for name, entry in file.header.items() if name.startswith(family.prefix)}
    if other := sorted(dtypes - {"F16", "BF16", "F32"}):
        width = f"8 bits ({other[0]})" if other[0].startswith("F8") else other[0]
        raise ModelError(
            f"{file.name!r} stores its UNet in {width}, which cannot hold what a step changes; choose the "
            "fp16, bf16 or fp32 checkpoint."
        )
    return family.variant(family, file.header, file.get_tensor)


def stored_dtypes(path: Path, family: Family) -> str:
    """Dtypes in which a checkpoint stores its network, such as "fp16" or "fp16 and fp32"."""
    header, _, _ = read_header(path)
    dtypes = {entry["dtype"] for name, entry in header.items() if name.startswith(family.prefix)}
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    return " and ".join(sorted(names.get(dtype, dtype) for dtype in dtypes))
