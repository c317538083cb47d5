"""Recognition of a checkpoint file's model family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..base.errors import ModelError
from ..files.safetensors_format import opened, read_header
from . import families as families  # registers them
from .families.unet_layout import refusal
from .family import FAMILIES, Family, Shapes
from .source import NETWORK_PREFIX, OTHER_PREFIXES


def family_of(shapes: Shapes, file_name: str) -> Family:
    """The family of a checkpoint, from the shapes of its tensors by key.

    Raises:
        ModelError: no registered family recognizes the checkpoint, or its family cannot edit it.
    """
    for variant in (shapes, *_as_in_checkpoint(shapes)):
        for family in FAMILIES.values():
            # of a file with a network alone, the text encoders are another file
            if variant is not shapes and family.text_encoders:
                continue
            if family.recognize(family, variant, file_name):
                return family
    raise refusal(shapes, file_name)


def _as_in_checkpoint(shapes: Shapes) -> Iterator[Shapes]:
    """The shapes of a file that holds a network alone, named as in a checkpoint, for each possible prefix."""
    for prefix in OTHER_PREFIXES:
        tails = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        yield {f"{NETWORK_PREFIX}{tail}": shape for tail, shape in tails.items()}


def _dtypes(header: Mapping[str, dict], family: Family) -> set[str]:
    """Dtypes of the network's tensors in a file."""
    of_network = [entry["dtype"] for name, entry in header.items() if name.startswith(family.prefix)]
    return set(of_network or (entry["dtype"] for entry in header.values()))


def detect_family(path: Path) -> Family:
    """The family of a checkpoint file, in the file's variant (epsilon- or v-prediction).

    Raises:
        ModelError: see `family_of`; or the weights are stored in another dtype than fp16, bf16 or fp32.
    """
    header, _, _ = read_header(path)
    family = family_of({name: tuple(entry["shape"]) for name, entry in header.items()}, path.name)
    if other := sorted(_dtypes(header, family) - {"F16", "BF16", "F32"}):
        width = f"8 bits ({other[0]})" if other[0].startswith("F8") else other[0]
        raise ModelError(
            f"{path.name!r} stores its UNet in {width}, which cannot hold what a step changes; choose the "
            "fp16, bf16 or fp32 checkpoint."
        )

    def read(name: str) -> Tensor:
        with opened(path) as file:
            return file.get_tensor(name)

    return family.variant(family, header, read)


def stored_dtypes(path: Path, family: Family) -> str:
    """Dtypes in which a checkpoint stores its network, such as "fp16" or "fp16 and fp32"."""
    header, _, _ = read_header(path)
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    return " and ".join(sorted(names.get(dtype, dtype) for dtype in _dtypes(header, family)))
