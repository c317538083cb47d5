"""Recognition of a checkpoint file's model family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..base.errors import ConfigError, ModelError, brief_repr
from ..files.safetensors_format import OpenedFile, opened, read_header
from . import families as families  # registers them
from .families.unet_layout import VAE_PREFIX, refusal
from .family import FAMILIES, Family, Shapes, distilled
from .source import NETWORK_PREFIX, OTHER_PREFIXES, PREDICTIONS, ZERO_SNR
from .text_layout import check_text_encoders

_DISTILLED = re.compile(
    r"turbo|lightning|hyper[-_ ]?(sd|\d+[-_ ]?step)|(?<![a-z])(lcm|dmd2?|pcm|tcd|flash[-_ ]?sd)(?![a-z])",
    re.IGNORECASE,
)
"""Words for models that are distilled to few steps without guidance."""
_TELLING = ("modelspec.title", "modelspec.architecture", "modelspec.implementation", "cul_source")


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


def detect_family(path: Path, prediction: str = "auto") -> Family:
    """The family of a checkpoint file; see `family_in`."""
    with opened(path) as file:
        return family_in(file, prediction)


def family_in(file: OpenedFile, prediction: str = "auto") -> Family:
    """The family of an open checkpoint file, in the file's variant (epsilon- or v-prediction).

    Args:
        file: the file.
        prediction: what the network predicts, one of `PREDICTIONS`; `auto` goes by the file's marks.

    Raises:
        ConfigError: the prediction is unknown.
        ModelError: see `family_of` and `check_text_encoders`; or the weights are stored in another dtype than
            fp16, bf16 or fp32.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"The prediction is {brief_repr(prediction)}; choose one of {', '.join(PREDICTIONS)}."
        )
    header, metadata = file.header, file.metadata
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    family = family_of(shapes, file.name)
    check_text_encoders(family, shapes, file.name)
    if family.has_decoder and not any(name.startswith(VAE_PREFIX) for name in shapes):
        raise ModelError(
            f"{file.name!r} has no VAE, which {family.display_name} needs; choose a complete checkpoint."
        )
    if other := sorted(_dtypes(header, family) - {"F16", "BF16", "F32"}):
        is_wide = other[0] == "F64"
        width = f"8 bits ({other[0]})" if other[0].startswith("F8") else other[0]
        reason = "is not supported" if is_wide else "cannot hold what a step changes"
        raise ModelError(
            f"{file.name!r} stores its UNet in {width}, which {reason}; choose the fp16, bf16 or fp32 "
            "checkpoint."
        )

    if prediction == "auto":
        prediction = chosen_prediction(metadata)
    if prediction.startswith("velocity"):
        family = family.velocity(family, prediction == ZERO_SNR)
    elif prediction == "auto":
        variant, usual = family.variant(family, header, file.get_tensor), family.process
        if variant.process == usual and _is_marked(header, metadata):
            variant = family.velocity(
                family, "ztsnr" in header or metadata.get("ss_zero_terminal_snr") == "True"
            )
        family = variant
    return distilled(family) if _is_distilled(file.name, metadata) else family


def _is_distilled(file_name: str, metadata: Mapping[str, str]) -> bool:
    """Whether the name of the file, or its title, architecture or source, says that it is distilled."""
    told = [file_name, *(metadata.get(key, "") for key in _TELLING)]
    return any(_DISTILLED.search(text) for text in told)


def chosen_prediction(metadata: Mapping[str, str]) -> str:
    """The prediction that the user chose for the model in a file of ours; `auto` for other files."""
    chosen = metadata.get("cul_prediction", "auto")
    return chosen if chosen in PREDICTIONS else "auto"


def _is_marked(header: Mapping[str, dict], metadata: Mapping[str, str]) -> bool:
    """Whether ComfyUI's tensor `v_pred` or the metadata, as kohya's scripts write it, say velocity."""
    said = (metadata.get(key, "") for key in ("modelspec.prediction_type", "prediction_type"))
    words = {word.strip().lower().replace("-", "_") for word in said}
    return "v_pred" in header or bool(words & {"v", "v_pred", "v_prediction", "velocity"})


def stored_dtypes(path: Path, family: Family) -> str:
    """Dtypes in which a checkpoint stores its network, such as "fp16" or "fp16 and fp32"."""
    header, _, _ = read_header(path)
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    return " and ".join(sorted(names.get(dtype, dtype) for dtype in _dtypes(header, family)))
