"""Save Unlearned Checkpoint and Save as LoRA / Diff."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cul_core.output.checkpoint import ROUNDINGS, save_checkpoint
from ..cul_core.output.lora import save_difference, save_lora
from . import _folders, _host
from ._node import UnlearningNode
from ._types import LoadedModel, model_input

_HIDDEN = (io.Hidden.prompt, io.Hidden.extra_pnginfo)


def _header(cls: type[io.ComfyNode]) -> dict[str, str]:
    return _folders.workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)


def _left_out(model: LoadedModel) -> list[str]:
    """What the node says of a MODEL to which other nodes have added more than was forgotten."""
    if not _host.has_additions(model):
        return []
    return ["LoRAs that were added after Forget are not in the file."]


class SaveCheckpoint(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_SaveCheckpoint",
            display_name="Save Unlearned Checkpoint",
            category="unlearning/save",
            description="Writes the edited model as a full checkpoint with its history inside. Only the "
            "edited weights differ from the original file. Press R afterwards: the stock Load "
            "Checkpoint lists it.",
            inputs=[
                model_input("model", tooltip="The model to save."),
                io.String.Input(
                    "filename_prefix",
                    default="checkpoints/unlearned",
                    tooltip="Folder in ComfyUI's output folder and beginning of the name. The stock loaders "
                    "look into output/checkpoints. A number is added: nothing is overwritten.",
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(ROUNDINGS),
                    default="auto",
                    optional=True,
                    tooltip="How edited weights are rounded to the file's precision. auto: to the nearest "
                    "value, or stochastically where that would lose more than a fiftieth of the "
                    "edit, as in bf16 files. The node says how much is kept.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=list(_HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix):
        """Refuses what cannot be written before anything of the graph runs."""
        return _folders.check_output(filename_prefix)

    @classmethod
    def execute(cls, model, filename_prefix, rounding="auto"):
        said, path = [], _folders.output_path(filename_prefix)
        with _host.normal_tensors():
            path = save_checkpoint(
                model.at_strength, path, _host.raise_if_cancelled, _header(cls), rounding, said.append
            )
        _host.Progress(1).say("\n".join([f"Saved: {path}", *said, *_left_out(model)]))
        return io.NodeOutput(str(path))


class SaveLora(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_SaveLora",
            display_name="Save as LoRA / Diff",
            category="unlearning/save",
            description="Writes what was forgotten as a small file that the stock Load LoRA applies to the "
            "original checkpoint, at any strength.",
            inputs=[
                model_input("model", tooltip="The model whose edits are saved."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/unlearned",
                    tooltip="Folder in ComfyUI's output folder and beginning of the name. The stock LoRA "
                    "loaders look into output/loras. A number is added: nothing is overwritten.",
                ),
                io.Combo.Input(
                    "format",
                    options=["diff", "lora"],
                    default="diff",
                    tooltip="diff: exact, and as large as the edited weights. lora: smaller; exact for what "
                    "the preset exact has edited, else an approximation of the given rank. The node "
                    "says how much of the edit it keeps.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="Rank of an approximation; only for lora. An edit that can be written exactly "
                    "has a rank of its own, whatever is given here.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=list(_HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix):
        """Refuses what cannot be written before anything of the graph runs."""
        return _folders.check_output(filename_prefix)

    @classmethod
    def execute(cls, model, filename_prefix, format, rank):
        path, note = _folders.output_path(filename_prefix), ""
        progress = _host.Progress(1)

        def on_tensor(done: int, count: int) -> None:
            _host.raise_if_cancelled()
            progress.say(f"tensor {done} of {count}", now=False)

        with _host.normal_tensors():
            if format == "lora":
                saved = save_lora(model.at_strength, path, rank, _header(cls), on_tensor)
                path, note = saved.path, f"\n{saved.sentence}"
            else:
                path = save_difference(model.at_strength, path, _header(cls))
        progress.update(1)
        progress.say("\n".join([f"Saved: {path}{note}", *_left_out(model)]))
        return io.NodeOutput(str(path))


NODES = (SaveCheckpoint, SaveLora)
