"""Unlearning History."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cul_core.history.step_record import read_history
from ..cul_core.output.report import history_text
from . import _folders, _host
from ._node import UnlearningNode
from ._types import model_input

_KINDS = ("checkpoints", "loras")


class UnlearningHistory(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_History",
            display_name="Unlearning History",
            category="unlearning/look",
            description="Reads from any file this pack has written, or from a model, what was forgotten, when, how, "
            "and from which parent.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_folders.model_files(*_KINDS),
                    tooltip="A checkpoint, LoRA or diff. Press R to see new files.",
                ),
                model_input(
                    "model",
                    optional=True,
                    tooltip="A model to read in the place of the file, such as Forget's.",
                ),
            ],
            outputs=[io.String.Output(display_name="history", tooltip="One line per step.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file, model=None):
        status = _folders.model_path(file, *_KINDS).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, file, model=None):
        if model is None:
            text = history_text(file, *read_history(_folders.model_path(file, *_KINDS)))
        else:
            value = model.value
            source = {"name": value.source.name, "sha256": value.source.sha256}
            text = history_text("This model", value.history, source)
        _host.Progress(1).say(text)
        return io.NodeOutput(text)


NODES = (UnlearningHistory,)
