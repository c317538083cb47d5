"""Merge Unlearned Models."""

from __future__ import annotations

import dataclasses

from comfy_api.v0_0_2 import io

from ..cul_core.mergers import MERGERS
from ..cul_core.mergers.merge import merge
from ..cul_core.mergers.ties import TiesConfig
from ..cul_core.output.report import merge_text
from . import _host
from ._node import UnlearningNode
from ._types import model_input, model_outputs

_MOST = 6


class MergeUnlearnedModels(UnlearningNode):
    @classmethod
    def define_schema(cls):
        rules, defaults = (
            {field.name: field.metadata for field in dataclasses.fields(TiesConfig)},
            TiesConfig(),
        )
        ways = " ".join(f"{entry.name}: {entry.description} {entry.paper}." for entry in MERGERS)
        return io.Schema(
            node_id="CUL_Merge",
            display_name="Merge Unlearned Models",
            category="unlearning",
            description="Makes one model out of several that were unlearned from the same loaded model, "
            "each on its own. It has forgotten what each of them has, in whatever order; "
            "nothing is trained.",
            inputs=[
                model_input(
                    "model_1",
                    tooltip="The first model, from an Unlearn Step. All models must come from the same "
                    "checkpoint file.",
                ),
                model_input(
                    "model_2",
                    tooltip="The second model, usually from another Unlearn Step behind the same loader.",
                ),
                io.Combo.Input(
                    "how",
                    options=[entry.name for entry in MERGERS],
                    default="ties",
                    tooltip=f"Way of merging. {ways}",
                ),
                io.Float.Input(
                    "strength",
                    default=defaults.strength,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    round=0.001,
                    tooltip=f"{rules['strength']['help']} task_arithmetic adds every change in full at 1. "
                    "uniform ignores it.",
                ),
                io.Float.Input(
                    "keep_fraction",
                    default=defaults.keep_fraction,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=f"{rules['keep_fraction']['help']} Only for ties.",
                ),
                io.Combo.Input(
                    "trim",
                    options=list(rules["trim"]["choices"]),
                    default=defaults.trim,
                    tooltip=f"{rules['trim']['help']} Only for ties.",
                ),
                *(
                    model_input(
                        f"model_{number}",
                        optional=True,
                        tooltip=f"Model number {number}, of the same checkpoint file.",
                    )
                    for number in range(3, _MOST + 1)
                ),
            ],
            outputs=[
                *model_outputs(),
                io.String.Output(
                    display_name="report", tooltip="What was merged, how, and what it has forgotten, as text."
                ),
            ],
        )

    @classmethod
    def execute(cls, model_1, model_2, how, strength, keep_fraction, trim, **more):
        given = [model_1, model_2, *(model for _, model in sorted(more.items()) if model is not None)]
        entry, settings = (
            MERGERS.get(how),
            {"strength": strength, "keep_fraction": keep_fraction, "trim": trim},
        )
        used = {field.name for field in dataclasses.fields(entry.config)}
        progress = _host.Progress(1)

        def on_tensor(done: int, count: int) -> None:
            _host.raise_if_cancelled()
            progress.say(f"tensor {done} of {count}", now=False)

        with _host.normal_tensors():
            config = entry.config(**{name: value for name, value in settings.items() if name in used})
            value = merge([model.at_strength for model in given], config, on_tensor)
        text, result = merge_text(value), dataclasses.replace(model_1, value=value, strength=1.0)
        progress.update(1)
        progress.say(text)
        return io.NodeOutput(result, *_host.native(result), text)


NODES = (MergeUnlearnedModels,)
