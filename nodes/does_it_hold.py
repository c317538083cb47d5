"""Does It Hold?"""

from __future__ import annotations

import json

from comfy_api.v0_0_2 import io

from ..cul_core.audits.base import BUDGETS
from ..cul_core.audits.ladder import climb, ladder_text, rungs
from ..cul_core.base.errors import ConfigError
from . import _folders, _host
from ._host_network import HostNetworks
from ._node import UnlearningNode
from ._types import model_input

_FROM_THE_START = ("residual", "changes")
"""Audits that are on until a user chooses: they sample nothing with the edited model, and are quick."""


class DoesItHold(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_DoesItHold",
            display_name="Does It Hold?",
            category="unlearning/look",
            description="Tries to get back what a model has forgotten: by other words, from images, by learned "
            "words, by further training. Tells what else has changed. Every figure stands beside that of the "
            "untouched model.",
            inputs=[
                model_input("model", tooltip="The model to audit; it is not changed."),
                io.Combo.Input(
                    "budget",
                    options=list(BUDGETS),
                    default="quick",
                    tooltip="How hard each audit tries: how many images, prompts and updates.",
                ),
                io.Int.Input("sampling_seed", default=0, min=0, max=2**53 - 1, tooltip="Seed of everything."),
                io.String.Input(
                    "wordings",
                    default="",
                    multiline=True,
                    placeholder="name = other words",
                    tooltip="Prompts that mean a forgotten concept without its name: paraphrases, "
                    "descriptions, translations. One a line; 'name = prompt' gives a prompt to one concept.",
                ),
                *(
                    io.Boolean.Input(
                        entry.name, default=entry.name in _FROM_THE_START, tooltip=entry.description
                    )
                    for entry in rungs()
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="A verdict for each audit, then all figures with 95 % intervals.",
                ),
                io.String.Output(display_name="json", tooltip="The same figures as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, budget, sampling_seed, wordings, **chosen):
        entries = [entry for entry in rungs() if chosen.get(entry.name)]
        if not entries:
            raise ConfigError("No audit is chosen; switch on at least one.")
        given = {"seed": sampling_seed, "wordings": wordings, "store": str(_folders.store_folder())}
        networks, progress = HostNetworks(model), _host.Progress(100 * len(entries))
        names = [entry.display_name for entry in entries]

        def on_progress(name: str, done: int, total: int) -> None:
            _host.raise_if_cancelled()
            progress.update(int(100 * (names.index(name) + done / max(total, 1))))
            progress.say(f"{name}: {done} of {total}", now=False)

        with _host.normal_tensors(), _host.training_device(networks.free):
            network = networks.get(model.value.source)
            found = climb(entries, network, model.at_strength, (), budget, given, on_progress)
        text = ladder_text(found)
        progress.say(text)
        values = {rung.name: rung.to_json() for rung in found}
        return io.NodeOutput(text, json.dumps(values, indent=1))


NODES = (DoesItHold,)
