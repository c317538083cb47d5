"""Load Model for Unlearning, and Unlearn From MODEL for a model that is loaded already."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import io

from ..cul_core.base.errors import CulError, ModelError
from ..cul_core.files.safetensors_format import read_header
from ..cul_core.history.unlearn_model import UnlearnModel
from ..cul_core.models.families.unet_layout import is_unet
from ..cul_core.models.family import Family
from ..cul_core.models.recognize import detect_family, family_of, stored_dtypes
from ..cul_core.models.source import PREDICTIONS, stored_name
from ..cul_core.output.checkpoint import open_continued, open_model
from ..cul_core.output.report import model_text
from ..cul_core.store.eviction import hold
from ..cul_core.store.model_snapshots import snapshot_model
from . import _folders, _host
from ._host_network import unknown_family
from ._node import UnlearningNode
from ._types import LoadedModel, model_outputs

_SAMPLING_NOTE = (
    "ComfyUI takes it for another prediction: put ModelSamplingDiscrete with {} behind the model output."
)
_HOST_NAMES = {"noise": "eps", "velocity": "v_prediction"}
_made: set[Path] = set()
"""Files of kept weights that outputs in the host's cache may stand on."""


def _described(value: UnlearnModel) -> str:
    family, lines = value.family, []
    if not family.is_known:
        lines.append("an architecture that this pack does not know: what reads text was found by tracing")
    if family.recipe is not None and family.recipe.is_guess:
        lines.append("nobody has tuned forgetting on it: the preset's rate and iterations are guesses")
    text = f"{stored_dtypes(value.source.path, family)}, predicts {family.process.predicts}, {family.image_size_px} px"
    return "\n".join([model_text(value), text, *lines])


class LoadModel(UnlearningNode):
    @classmethod
    def define_schema(cls):
        files = _folders.model_files("checkpoints")
        return io.Schema(
            node_id="CUL_LoadModel",
            display_name="Load Model for Unlearning",
            category="unlearning",
            description="Opens a checkpoint for forgetting. Begin every unlearning graph here. A checkpoint "
            "that this pack has written goes on with its history; when the file it was made "
            "from is there too, drift stays measured from that file.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=files,
                    default="minicanvas.safetensors" if "minicanvas.safetensors" in files else None,
                    tooltip="A .safetensors checkpoint. minicanvas.safetensors is the tiny model that comes "
                    "with this pack.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=list(PREDICTIONS),
                    default="auto",
                    optional=True,
                    tooltip="What the model predicts. auto: as its file says. Choose velocity for a "
                    "v-prediction model whose file does not say so; ComfyUI's ModelSamplingDiscrete makes "
                    "it draw as such.",
                ),
            ],
            outputs=model_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint, prediction="auto"):
        status = _folders.model_path(checkpoint, "checkpoints").stat()
        return f"{status.st_size} {status.st_mtime_ns} {prediction}"

    @classmethod
    def validate_inputs(cls, checkpoint, prediction="auto"):
        """Refuses, from the file's header alone, what cannot be trained before anything of the graph runs."""
        try:
            if checkpoint is not None:  # not a link
                detect_family(_folders.model_path(checkpoint, "checkpoints"), prediction or "auto")
        except CulError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, checkpoint, prediction="auto"):
        path = _folders.model_path(checkpoint, "checkpoints")
        listed = _folders.model_paths("checkpoints")
        with _host.normal_tensors():
            value = open_continued(
                path, itertools.chain(listed, _folders.model_snapshots().glob("*.safetensors")), prediction
            )
        hold(value.source.path, value.source)  # it may be one of the kept weights
        model, clip, vae = _host.load_native(value.source.path)
        if model is None or clip is None:
            raise ModelError(
                f"{path.name!r} has no {'text encoder' if clip is None else 'network'}; load its parts with their "
                "own loaders and connect them to Unlearn From MODEL."
            )
        loaded = LoadedModel(value, model, clip, vae)
        predicted, theirs = value.family.process.predicts, _host.process_of(model).predicts
        note = "" if predicted == theirs else f"\n{_SAMPLING_NOTE.format(_HOST_NAMES[predicted])}"
        _host.Progress(1).say(_described(value) + note)
        return io.NodeOutput(loaded, *_host.native(loaded))


class UnlearnFromModel(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_FromModel",
            display_name="Unlearn From MODEL",
            category="unlearning",
            description="Begins an unlearning graph with a model that other nodes have loaded, LoRAs "
            "included: what comes in counts as the pretrained model. Its weights are kept as a "
            "file, once for each model, unless a file has them already. A model that Forget or another of "
            "these nodes has made goes on with its history.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any text-to-image model that ComfyUI has loaded, in fp16, bf16 or fp32, with or "
                    "without LoRAs and merges. Nodes that change sampling or attention go behind this one.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that belongs to it, with the same LoRAs. CLIP Set Last Layer "
                    "goes behind this node.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Its VAE. Without one there are no previews and comparisons, and checkpoints saved "
                    "of a model that no file holds have none either.",
                ),
            ],
            outputs=model_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return deleted_snapshots()

    @classmethod
    def execute(cls, model, clip, vae=None):
        loaded, where = opened(model, clip, vae)
        _host.Progress(1).say(_described(loaded.value) + where)
        return io.NodeOutput(loaded, *_host.native(loaded))


def deleted_snapshots() -> list[str]:
    """Names of files of kept weights that were deleted meanwhile: outputs that stand on them are made anew."""
    return sorted(path.name for path in _made if not path.is_file())


def opened(model: Any, clip: Any, vae: Any) -> tuple[LoadedModel, str]:
    """(the model that a MODEL with history carries, or a new one with the MODEL as pretrained model; a note on
    where its weights are kept).

    Args:
        model: MODEL of the host.
        clip: CLIP that belongs to a MODEL without history.
        vae: VAE that belongs to it, in the place of the one that a history names; None without one.

    Raises:
        ModelError: it cannot be edited, or carries more than weights.
    """
    if _host.has_history(model):
        loaded = _host.with_history(model)
        return (loaded if vae is None else replace(loaded, vae=vae)), ""
    _host.require_weights_only(model, clip)
    family = _family_of(model, clip)
    process, where = _host.process_of(model), ""
    path = _whole_file(model, clip, vae, family)
    if path is not None:
        value = open_model(path)
        value = value if family.text_encoders else replace(value, family=family)
    else:
        value, where = _snapshot(model, clip, vae, family)
    if not family.text_encoders:
        value = replace(value, source=replace(value.source, text=_host.text_identity(clip)))
    if value.family.process.predicts != process.predicts:
        raise ModelError(
            f"The MODEL predicts {process.predicts}, where {value.family.display_name} predicts "
            f"{value.family.process.predicts}; choose another model."
        )
    return LoadedModel(value, model, clip, vae), where


def _snapshot(model: Any, clip: Any, vae: Any, family: Family) -> tuple[UnlearnModel, str]:
    """(a model whose source is a file with the MODEL's weights, written if there is none; a note on where)."""
    if vae is None and family.has_decoder:
        raise ModelError(
            f"{family.display_name} cannot do without its VAE here; connect the one that came with the MODEL."
        )
    progress = _host.Progress(1)

    def on_tensor(done: int, count: int) -> None:
        _host.raise_if_cancelled()
        progress.say(f"keeping the weights: {100 * done // count} %", now=False)

    weights = _host.weights_of(model, *((clip, vae) if family.text_encoders else (None, None)))
    _require_text_encoders(family, weights)
    source = snapshot_model(_folders.model_snapshots(), weights, on_tensor)
    _made.add(source.path)
    progress.update(1)
    where = f"\nkept in {'/'.join(source.path.parts[-3:-1])} as {source.path.name[:12]}..."
    return UnlearnModel(source, detect_family(source.path) if family.text_encoders else family), where


def _family_of(model: Any, clip: Any) -> Family:
    """The family of a MODEL, with the process that the host gives a flow transformer; made for an unknown one.

    Raises:
        ModelError: it is of a kind that cannot be edited.
    """
    shapes = _host.shapes_of(model)
    try:
        family = family_of(shapes, "MODEL")
    except ModelError:
        if is_unet(shapes):
            raise
        with _host.normal_tensors():
            return unknown_family(model, clip)
    return family if family.text_encoders else replace(family, process=_host.process_of(model))


def _whole_file(model: Any, clip: Any, vae: Any, family: Family) -> Path | None:
    """The file of a MODEL, if it holds every matrix of the network under its own name, and the CLIP and VAE if the
    family's checkpoints hold them."""
    path = _host.file_of(model)
    if path is None or not family.is_known:
        return None
    if family.text_encoders:
        parts = [clip.patcher, *([] if vae is None else [vae.patcher])]
        predicted = detect_family(path).process.predicts
        if predicted != _host.process_of(model).predicts or any(
            _host.file_of(part) != path for part in parts
        ):
            return None
    header, _, _ = read_header(path)
    for key, shape in _host.shapes_of(model).items():
        if key.startswith(family.prefix) and len(shape) > 1:  # a host may rename norms
            name = stored_name(header, key)
            if name is None or tuple(header[name]["shape"]) != shape:
                return None
    return path


def _require_text_encoders(family: Family, weights: Mapping[str, object]) -> None:
    if any(not any(name.startswith(encoder.prefix) for name in weights) for encoder in family.text_encoders):
        raise ModelError(
            f"The CLIP is not one of {family.display_name}; connect the CLIP that came with the MODEL."
        )


NODES = (LoadModel, UnlearnFromModel)
