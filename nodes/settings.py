"""One node per registered method, one per registered regularizer, and Training Settings, all read off the
registries."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from comfy_api.v0_0_2 import io

from ..cul_core.base.config import Config, limits
from ..cul_core.base.registry import Entry
from ..cul_core.methods import METHODS
from ..cul_core.parts.training_config import TrainingConfig
from ..cul_core.regularizers import REGULARIZERS
from ..cul_core.requests.presets import PRESETS
from ._node import UnlearningNode
from ._types import Method, Regularizers, Training

_AS_PRESET = "as the preset says"
_RECOMMENDED = PRESETS["recommended"]


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
    """What the recommended preset sets, if it uses this; else the config's own defaults."""
    used = (_RECOMMENDED.method, *_RECOMMENDED.regularizers)
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
                        tooltip="How to forget; takes the place of the preset's method.",
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
                        tooltip="What holds the rest in place; takes the place of the preset's "
                        "regularizers. Chain several of these nodes.",
                    )
                ],
            )

        @classmethod
        def execute(cls, regularizers=(), **values):
            return io.NodeOutput((*regularizers, entry.config(**values)))

    return RegularizerNode


class TrainingSettings(UnlearningNode):
    @classmethod
    def define_schema(cls):
        rules = {field.name: field.metadata for field in dataclasses.fields(TrainingConfig)}

        def help_of(name: str) -> str:
            return f"{rules[name]['help']} 0 means as the preset says for this kind of model."

        def choice(name: str) -> io.Input:
            return io.Combo.Input(
                name,
                options=[_AS_PRESET, *rules[name]["choices"]],
                default=_AS_PRESET,
                tooltip=rules[name]["help"],
            )

        return io.Schema(
            node_id="CUL_TrainingSettings",
            display_name="Training Settings",
            category="unlearning",
            description="How long and how strongly a step trains, where it should differ from what the "
            "preset says. More iterations or a higher learning rate forget more surely and cost "
            "more of the rest.",
            inputs=[
                io.Int.Input("iterations", default=0, min=0, max=1_000_000, tooltip=help_of("iterations")),
                io.Int.Input("batch_size", default=0, min=0, max=1024, tooltip=help_of("batch_size")),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-9,
                    tooltip=help_of("learning_rate"),
                ),
                choice("schedule"),
                choice("group"),
                io.Int.Input(
                    "anchor_count",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Pictures by the pretrained model that the step trains on; they are drawn once "
                    "and kept. 0 means as the preset says for this kind of model.",
                ),
                io.Int.Input(
                    "anchor_steps",
                    default=0,
                    min=0,
                    max=200,
                    tooltip="Sampling steps of each of them. 0 means as the preset says for this kind of "
                    "model.",
                ),
            ],
            outputs=[
                Training.Output(
                    display_name="training",
                    tooltip="Training settings for an Unlearn Step or an Unlearn Sequence.",
                )
            ],
        )

    @classmethod
    def execute(cls, **values):
        return io.NodeOutput({name: value for name, value in values.items() if value not in (0, _AS_PRESET)})


NODES = (TrainingSettings, *map(_method_node, METHODS), *map(_regularizer_node, REGULARIZERS))
