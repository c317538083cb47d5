"""Evaluate Forgetting and Drift Map."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..cul_core.audits.classification import classifier_of
from ..cul_core.audits.classifier_scores import LABELS, METRICS, table
from ..cul_core.output.charts import metric_chart
from ..cul_core.output.drift import drift_map, drift_of, total_drift
from ..cul_core.output.report import model_text
from . import _host
from ._host_network import HostNetworks
from ._node import UnlearningNode
from ._types import Scores, model_input


class EvaluateForgetting(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_Evaluate",
            display_name="Evaluate Forgetting",
            category="unlearning/look",
            description="Draws MiniCanvas' styles and objects and counts what is forgotten (UA), what stays "
            "of the styles (IRA) and of the objects (CRA). Chain one after every step to see "
            "the curves. Works for MiniCanvas, which has a classifier.",
            inputs=[
                model_input("model", tooltip="The model to score."),
                io.Int.Input(
                    "pictures",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Images per style and object. 1 means some 300 images, half a minute on a CPU.",
                ),
                io.Int.Input("sampling_seed", default=0, min=0, max=2**53 - 1, tooltip="Seed of the images."),
                Scores.Input(
                    "earlier",
                    optional=True,
                    tooltip="Scores after earlier requests, for further points of the chart.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="table",
                    tooltip="The scores after each request, in percent, with 95 % intervals of the last.",
                ),
                io.Image.Output(
                    display_name="chart", tooltip="UA, IRA and CRA against the number of requests."
                ),
                Scores.Output(
                    display_name="scores",
                    tooltip="These scores and the earlier ones, for the next Evaluate Forgetting.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, pictures, sampling_seed, earlier=()):
        classifier = classifier_of(model.value.family)
        names = [concept["target"] for concept in model.value.forgotten]
        total, networks = classifier.count(names, pictures), HostNetworks(model)
        progress = _host.Progress(total)

        def on_batch(done: int) -> None:
            _host.raise_if_cancelled()
            progress.update(done)
            progress.say(f"image {done} of {total}", now=False)

        with _host.normal_tensors(), _host.training_device(networks.free):
            scores = classifier.evaluate(
                networks.get(model.value.source),
                model.at_strength,
                names,
                seed=sampling_seed,
                per_cell=pictures,
                on_batch=on_batch,
            )
        requests = model.value.requests
        label = f"after {requests}" if requests else "untouched"
        rows = [*earlier, (requests, label, scores.to_json())]
        spread = ", ".join(
            f"{name} {low:.1f} to {high:.1f}" for name, (low, high) in scores.intervals.items()
        )
        text = table([(label, values) for _, label, values in rows]) + f"\n95 % intervals: {spread}"
        chart = metric_chart(
            "Forgotten and kept", {"this chain": [(request, values) for request, _, values in rows]}
        )
        measured = {name: getattr(scores, name) for name in METRICS}
        progress.say(
            f"{label}: "
            + ", ".join(
                f"{LABELS[name]} {value:.0f}" for name, value in measured.items() if value is not None
            )
        )
        progress.update(total, chart)
        image = _host.to_image_tensor(chart)
        return io.NodeOutput(text, image, tuple(rows), ui=ui.PreviewImage(image, cls=cls))


class DriftMap(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_DriftMap",
            display_name="Drift Map",
            category="unlearning/look",
            description="Shows which layers forgetting has moved, and how far from the pretrained weights.",
            inputs=[model_input("model", tooltip="The model to look into.")],
            outputs=[
                io.Image.Output(
                    display_name="map",
                    tooltip="A bar per layer: its change in percent of its pretrained size.",
                ),
                io.String.Output(display_name="table", tooltip="The same as text, with the total distance."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model):
        with _host.normal_tensors():
            drifts = drift_of(model.at_strength)
        chart = drift_map(f"Drift from the pretrained weights: {total_drift(drifts):.3f} in all", drifts)
        text = "\n".join(
            [
                model_text(model.value),
                *(f"{drift.name}  {drift.distance:.4f}  {drift.percent:.2f} %" for drift in drifts),
            ]
        )
        image = _host.to_image_tensor(chart)
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))


NODES = (EvaluateForgetting, DriftMap)
