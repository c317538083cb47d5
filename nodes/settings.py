"""Training Settings."""

from __future__ import annotations

import dataclasses

from comfy_api.v0_0_2 import io

from ..cul_core.base.config import limits
from ..cul_core.models.sampling import SamplerConfig
from ..cul_core.parts.training_config import TrainingConfig
from ..cul_core.requests.request import MOST_ANCHORS
from ._node import UnlearningNode
from ._types import Training

_AS_PRESET = "as the preset says"


class TrainingSettings(UnlearningNode):
    @classmethod
    def define_schema(cls):
        rules = {field.name: field.metadata for field in dataclasses.fields(TrainingConfig)}

        def help_of(name: str) -> str:
            return f"{rules[name]['help']} 0: the preset's value for this kind of model."

        def choice(name: str) -> io.Input:
            return io.Combo.Input(
                name,
                options=[_AS_PRESET, *rules[name]["choices"]],
                default=_AS_PRESET,
                tooltip=rules[name]["help"],
            )

        fields = (*dataclasses.fields(TrainingConfig), *dataclasses.fields(SamplerConfig))
        most = {field.name: limits(field)[1] for field in fields if type(field.default) in (int, float)}
        return io.Schema(
            node_id="CUL_TrainingSettings",
            display_name="Training Settings",
            category="unlearning",
            description="How long and how strongly a step trains, where it should differ from what the "
            "preset says. More iterations or a higher learning rate forget more surely and cost "
            "more of the rest.",
            inputs=[
                io.Int.Input(
                    "iterations", default=0, min=0, max=most["iterations"], tooltip=help_of("iterations")
                ),
                io.Int.Input(
                    "batch_size", default=0, min=0, max=most["batch_size"], tooltip=help_of("batch_size")
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=most["learning_rate"],
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
                    max=MOST_ANCHORS,
                    tooltip="Images that the pretrained model samples for the step to train on; they are "
                    "sampled once and stored. 0: the preset's value for this kind of model.",
                ),
                io.Int.Input(
                    "anchor_steps",
                    default=0,
                    min=0,
                    max=most["steps"],
                    tooltip="Sampling steps of each anchor image. 0: the preset's value for this kind of "
                    "model.",
                ),
                io.Float.Input(
                    "anchor_guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    optional=True,
                    tooltip="Guidance scale (CFG) of each of them. 1 is none, as distilled models (Turbo, "
                    "Lightning, LCM) need it. 0 means as the preset says for this kind of model.",
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


NODES = (TrainingSettings,)
