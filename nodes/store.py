"""Unlearning Store."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cul_core.store.steps import PARTS, StepStore
from . import _folders, _host
from ._node import UnlearningNode

_CLEARED = {"nothing": (), "unfinished": ("states",), "anchors": ("anchors",), "everything": PARTS}


class UnlearningStore(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_Store",
            display_name="Unlearning Store",
            category="unlearning/look",
            description="Shows what is kept so that nothing is trained twice: finished steps, where "
            "unfinished ones stopped, and anchor images, in models/unlearning_chains. Removes "
            "them if asked to; a step that is trained at the moment keeps its files.",
            inputs=[
                io.Combo.Input(
                    "clear",
                    options=list(_CLEARED),
                    default="nothing",
                    tooltip="Files to remove first. unfinished: states of stopped steps, which then begin "
                    "anew. anchors: anchor images, sampled again when needed. everything: finished steps "
                    "too, trained again when needed.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="contents",
                    tooltip="Number and size of the stored files, and what each step forgot.",
                )
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, clear):
        return float("nan")  # the folder changes without the graph

    @classmethod
    def execute(cls, clear):
        store = StepStore(_folders.store_folder())
        text = "\n".join(([store.clear(*_CLEARED[clear])] if _CLEARED[clear] else []) + [store.describe()])
        _host.Progress(1).say(text)
        return io.NodeOutput(text)


NODES = (UnlearningStore,)
