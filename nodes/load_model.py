"""Load Model for Unlearning."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cul_core.checkpoint import open_continued
from ..cul_core.evaluation.report import model_text
from . import _folders, _host
from ._node import UnlearningNode
from ._types import LoadedModel, model_outputs


class LoadModel(UnlearningNode):
    @classmethod
    def define_schema(cls):
        files = _folders.model_files("checkpoints")
        return io.Schema(
            node_id="CUL_LoadModel",
            display_name="Load Model for Unlearning",
            category="unlearning",
            description="Opens a checkpoint for forgetting. Begin every unlearning graph here. A checkpoint that this pack has written goes "
            "on with its history; when the file it was made from is there too, drift stays measured from that file.",
            inputs=[
                io.Combo.Input("checkpoint", options=files, default="minicanvas.safetensors" if "minicanvas.safetensors" in files else None,
                               tooltip="A .safetensors checkpoint. minicanvas.safetensors is the tiny model that comes with this pack."),
            ],
            outputs=model_outputs(),
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, checkpoint):
        status = _folders.model_path(checkpoint, "checkpoints").stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, checkpoint):
        path = _folders.model_path(checkpoint, "checkpoints")
        with _host.normal_tensors():
            value = open_continued(path, (_folders.model_path(name, "checkpoints") for name in _folders.model_files("checkpoints")))
        loaded = LoadedModel(value, *_host.load_native(value.source.path))
        _host.Progress(1).say(model_text(value))
        return io.NodeOutput(loaded, *_host.native(loaded))


NODES = (LoadModel,)
