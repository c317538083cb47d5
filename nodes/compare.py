"""Compare Before/After."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..cul_core.base.errors import ConfigError
from ..cul_core.concepts.concept import check_count, check_text
from ..cul_core.output.charts import labelled_grid
from . import _host
from ._node import UnlearningNode
from ._types import model_input

_WRAP = 18
_MOST, _LONGEST = 100, 10_000


def _wrapped(text: str) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= _WRAP:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


class Compare(UnlearningNode):
    @classmethod
    def define_schema(cls):
        samplers, schedulers = _host.samplers()
        return io.Schema(
            node_id="CUL_Compare",
            display_name="Compare Before/After",
            category="unlearning/look",
            description="Draws the same prompts from the same seed with two or three models and puts the "
            "images in one labelled grid.",
            inputs=[
                model_input(
                    "before", tooltip="Model of the first row, usually from Load Model for Unlearning."
                ),
                model_input("after", tooltip="Model of the second row, usually from the last Unlearn Step."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    placeholder="one prompt per line",
                    tooltip="Prompts, one per line, each a column. Ask for forgotten concepts and for "
                    "concepts that should have stayed.",
                ),
                io.Int.Input(
                    "sampling_seed", default=0, min=0, max=2**53 - 1, tooltip="Seed of every image."
                ),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg", default=5.0, min=1.0, max=30.0, step=0.1, tooltip="Classifier-free guidance."
                ),
                io.Combo.Input(
                    "sampler_name", options=samplers, default="dpmpp_2m", tooltip="The host's sampler."
                ),
                io.Combo.Input(
                    "scheduler", options=schedulers, default="karras", tooltip="The host's noise schedule."
                ),
                io.String.Input("negative", default="", tooltip="Negative prompt of every image."),
                model_input(
                    "other",
                    optional=True,
                    tooltip="Model of a third row, such as that of a step without regularizers.",
                ),
                io.String.Input(
                    "row_labels",
                    default="before, after, other",
                    tooltip="Labels of the rows, separated by commas.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="The labelled grid of images.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        before,
        after,
        prompts,
        sampling_seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        negative,
        row_labels,
        other=None,
    ):
        wanted = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not wanted:
            raise ConfigError(
                "Compare Before/After has no prompt; type at least one, each on a line of its own."
            )
        check_count("prompts", wanted, _MOST)
        for prompt in (*wanted, negative):
            check_text("prompt", prompt, _LONGEST)
        models = [model for model in (before, after, other) if model is not None]
        labels = [label.strip() for label in row_labels.split(",")] + [""] * len(models)
        progress, rows, done = _host.Progress(len(models) * len(wanted)), [], 0
        for label, model in zip(labels, models, strict=False):
            rows.append((label, []))
            for image in _host.sample(
                *_host.native(model),
                model.value.family.image_size_px,
                wanted,
                seed=sampling_seed,
                steps=steps,
                cfg=cfg,
                sampler=sampler_name,
                scheduler=scheduler,
                negative=negative,
            ):
                rows[-1][1].append(image)
                done += 1
                progress.update(done)
        cell = 128 if models[0].value.family.image_size_px <= 128 else 256
        grid = labelled_grid(
            f"Equal seeds ({sampling_seed})", [_wrapped(prompt) for prompt in wanted], rows, cell
        )
        image = _host.to_image_tensor(grid)
        progress.update(done, grid)  # a live preview would hide the image below it
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = (Compare,)
