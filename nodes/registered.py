"""One node factory for what the registries hold: a node per method and per regularizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from comfy_api.v0_0_2 import io

from ..cul_core.base.config import Config, limits
from ..cul_core.base.registry import Entry
from ..cul_core.methods import METHODS
from ..cul_core.regularizers import REGULARIZERS
from ..cul_core.requests.presets import PRESETS
from ._node import UnlearningNode
from ._types import Method, Regularizers

_TRAINED = PRESETS["trained"]


def _widget(field: dataclasses.Field, default: Any) -> io.Input:
    rules = field.metadata
    details = {"default": default, "tooltip": rules["help"], "optional": bool(rules.get("added_later"))}
    if "choices" in rules:
        return io.Combo.Input(field.name, options=list(rules["choices"]), **details)
    if isinstance(default, bool):
        return io.Boolean.Input(field.name, **details)
    if isinstance(default, str):
        return io.String.Input(field.name, **details)
    low, high = limits(field)
    if isinstance(default, int):
        return io.Int.Input(field.name, min=low, max=high, **details)
    step = 10.0 ** (math.floor(math.log10(default)) - 1) if default else 0.01
    return io.Float.Input(field.name, min=low, max=high, step=step, round=step / 1000, **details)


def _widgets(config: Config, later: bool = False) -> list[io.Input]:
    """Those that were there from the start, or those that came later: optional and last, so that graphs saved
    before still run."""
    return [
        _widget(field, getattr(config, field.name))
        for field in dataclasses.fields(config)
        if bool(field.metadata.get("added_later")) == later
    ]


def _defaults(config: type[Config]) -> Config:
    """What the preset `trained` sets, if it uses this; else the config's own defaults."""
    used = (_TRAINED.method, *_TRAINED.regularizers)
    return next((instance for instance in used if type(instance) is config), config())


def _described(entry: Entry) -> str:
    return f"{entry.description} {entry.paper}."


def _method_node(entry: Entry) -> type[io.ComfyNode]:
    class MethodNode(UnlearningNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=f"CUL_Method_{entry.name}",
                display_name=f"Method: {entry.display_name}",
                category="unlearning/methods",
                description=_described(entry),
                inputs=[*_widgets(_defaults(entry.config)), *_widgets(_defaults(entry.config), later=True)],
                outputs=[
                    Method.Output(
                        display_name="method",
                        tooltip="Method for an Unlearn Step, in place of the preset's.",
                    )
                ],
            )

        @classmethod
        def execute(cls, **values):
            return io.NodeOutput(entry.config(**values))

    return MethodNode


def _regularizer_node(entry: Entry) -> type[io.ComfyNode]:
    class RegularizerNode(UnlearningNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=f"CUL_Regularizer_{entry.name}",
                display_name=f"Regularizer: {entry.display_name}",
                category="unlearning/regularizers",
                description=_described(entry),
                inputs=[
                    *_widgets(_defaults(entry.config)),
                    Regularizers.Input(
                        "regularizers", optional=True, tooltip="Regularizers that act before this one."
                    ),
                    *_widgets(_defaults(entry.config), later=True),
                ],
                outputs=[
                    Regularizers.Output(
                        display_name="regularizers",
                        tooltip="Regularizers for an Unlearn Step, in place of the preset's. "
                        "Chain several of these nodes.",
                    )
                ],
            )

        @classmethod
        def execute(cls, regularizers=(), **values):
            return io.NodeOutput((*regularizers, entry.config(**values)))

    return RegularizerNode


NODES = (
    *map(_method_node, METHODS),
    *map(_regularizer_node, REGULARIZERS),
)
