"""Take Back."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cul_core.base.errors import ConceptError
from ..cul_core.output.report import take_back_text
from ..cul_core.store.steps import StepStore
from ..cul_core.training.solved_chain import take_back
from . import _folders, _host
from ._host_network import HostNetworks
from ._node import UnlearningNode
from ._types import model_input, model_outputs


class TakeBack(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_TakeBack",
            display_name="Take Back",
            category="unlearning",
            description="Takes requests back that were solved in closed form, as by the presets recommended "
            "and exact: the model knows these concepts again, as if they had never been asked "
            "for. All other requests stay. What was forgotten by training cannot be taken back.",
            inputs=[
                model_input(
                    "model",
                    tooltip="Model whose requests to take back, from Forget, an Unlearn Step or Sequence.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    placeholder="Candy Stripes",
                    tooltip="Forgotten concepts to take back, one per line, as they were typed. Upper and "
                    "lower case are the same.",
                ),
            ],
            outputs=[
                *model_outputs(),
                io.String.Output(
                    display_name="report",
                    tooltip="What was taken back, what is still forgotten, and what of it cannot be taken "
                    "back exactly.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, names):
        wanted = [name.strip() for name in names.splitlines() if name.strip()]
        if not wanted:
            raise ConceptError("No name is given; type what to take back, one name per line.")
        networks, progress = HostNetworks(model), _host.Progress(1)
        with _host.normal_tensors(), _host.training_device(networks.free) as device:
            value = take_back(
                model.value,
                wanted,
                device=device,
                networks=networks,
                check=_host.raise_if_cancelled,
                on_stage=lambda text: progress.say(text, now=False),
                text_sums=StepStore(_folders.store_folder()).texts,
            )
        text, result = take_back_text(model.value, value), model.with_value(value)
        progress.update(1)
        progress.say(text)
        return io.NodeOutput(result, *_host.native(result), text)


NODES = (TakeBack,)
