"""Unlearn Step and Unlearn Sequence: the nodes that make a model forget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial

import torch
from comfy_api.v0_0_2 import io

from ..cul_core.concepts.concept import KINDS
from ..cul_core.concepts.parsing import ConceptList, parse_keep, parse_requests
from ..cul_core.files.locks import Waiting
from ..cul_core.history.unlearn_model import UnlearnModel
from ..cul_core.methods import METHODS
from ..cul_core.output.charts import labelled_grid, loss_curve
from ..cul_core.output.report import brief_text, step_text
from ..cul_core.requests.presets import PRESETS
from ..cul_core.requests.previews import preview_interval, preview_prompts
from ..cul_core.requests.request import Request
from ..cul_core.requests.resolve import Overrides, resolve
from ..cul_core.store.steps import StepStore
from ..cul_core.training.callbacks import Callbacks
from ..cul_core.training.resume import StateStore
from ..cul_core.training.step import StepReport, run_step
from . import _folders, _host
from ._host_network import HostNetworks
from ._node import UnlearningNode
from ._types import Concepts, LoadedModel, Method, Regularizers, Training, model_input, model_outputs
from .concepts import ANCHOR_TIP, KEEP_TIP, KIND_TIP

logger = logging.getLogger(__name__)


def _how_to_train() -> list[io.Input]:
    """Inputs that both nodes end with."""
    descriptions = " ".join(f"{name}: {entry.description}" for name, entry in PRESETS.items())
    return [
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="recommended",
            tooltip="Method, regularizers and training settings. Every figure is of MiniCanvas: on Stable "
            "Diffusion nothing was measured, so no preset is recommended there by a measurement. "
            f"{descriptions}",
        ),
        io.Int.Input(
            "train_seed",
            default=0,
            min=0,
            max=2**53 - 1,
            tooltip="Seed of everything random in the step. Another seed computes it anew; the same seed "
            "takes the finished step from the store.",
        ),
        io.Int.Input(
            "preview_every",
            default=20,
            min=0,
            max=100_000,
            tooltip="Iterations between previews of the same prompts and noise; more where previews would "
            "take over a twentieth of the training. Without training, as in the preset recommended, "
            "there is one before and one after the last request. 0: no previews.",
        ),
        Method.Input("method", optional=True, tooltip="Method in place of the preset's."),
        Regularizers.Input("regularizers", optional=True, tooltip="Regularizers in place of the preset's."),
        Training.Input(
            "training", optional=True, tooltip="Training settings in place of some of the preset's."
        ),
    ]


def _outputs() -> list:
    return [
        *model_outputs(),
        io.String.Output(
            display_name="report", tooltip="What was forgotten, how, and what it cost, as text."
        ),
        io.Image.Output(
            display_name="loss_plot",
            tooltip="The training loss against the iteration; a note where nothing was trained.",
        ),
    ]


def _request(
    loaded: LoadedModel, concepts: ConceptList, name: str, train_seed: int, method, regularizers, training
) -> Request:
    overrides = Overrides(method, regularizers, training or {}, seed=train_seed)
    return resolve(name, loaded.value.family, concepts.targets, concepts.keep, overrides)


class _Watch:
    """Shows one run of requests on the node: a bar over all of their iterations, the time left, and
    previews."""

    def __init__(self, loaded: LoadedModel, requests: Sequence[Request], preview_every: int):
        self._loaded, self._every, self._last = loaded, preview_every, requests[-1]
        self._progress = _host.Progress(sum(max(request.training.iterations, 1) for request in requests))
        self._done, self._before, self._lines, self._note = 0, [], [], ""

    def waiting(self) -> Callable[[], None]:
        """To be called while another process trains the next step."""
        say = Waiting("Another ComfyUI trains this step", self._progress.say, every_seconds=1.0)

        def wait() -> None:
            say()
            _host.raise_if_cancelled()

        return wait

    def finished(self, request: Request, report: StepReport, note: str) -> None:
        self._done += max(request.training.iterations, 1)
        self._progress.update(self._done)
        self._lines.insert(0, brief_text(report) + note)
        self._progress.say("\n".join(self._lines))

    def callbacks(self, request: Request) -> Callbacks:
        names = " + ".join(concept.name for concept in request.concepts)
        shown = preview_prompts(request)
        is_closed_form = METHODS.of(request.method).cls.is_closed_form
        every = 0 if is_closed_form and request is not self._last else self._every
        if self._loaded.value.family.image_size_px > 768:
            # the first and the last: each takes as long as many iterations
            shown = shown[:: max(len(shown) - 1, 1)]

        def on_anchors(done: int, count: int) -> None:
            self._progress.say(f"{names}: anchor image {done} of {count}", now=False)

        def on_progress(progress) -> None:
            self._progress.update(self._done + progress.iteration)
            self._progress.say(
                f"{names}: iteration {progress.iteration} of {progress.iterations}, loss "
                f"{progress.loss:.3f}, {progress.seconds_left:.0f} s left{self._note}",
                now=False,
            )

        def on_preview(iteration: int, latents) -> None:
            images = _host.preview(self._loaded, latents)
            if iteration == 0:
                self._before = [] if isinstance(images, str) else images
            if isinstance(images, str):
                logger.warning("no preview of iteration %d: %s", iteration, images)
                self._progress.say(f"{names}: no preview, {images}")
                return
            rows = [
                (label, row)
                for label, row in (("before", self._before), ("now", images if iteration else []))
                if row
            ]
            if is_closed_form:
                title = f"{names}: {'now' if iteration else 'before'}"
            else:
                title = f"{names}: iteration {iteration} of {request.training.iterations}"
            self._progress.update(
                self._done + iteration, labelled_grid(title, [label for label, _ in shown], rows, cell=128)
            )

        def on_stage(text: str) -> None:
            self._progress.say(f"{names}: {text}{self._note}", now=False)

        def on_message(text: str) -> None:
            self._note = f"\n{text}"
            self._progress.say(f"{names}{self._note}")

        return Callbacks(
            on_progress,
            _host.should_stop,
            on_anchors,
            on_preview,
            tuple(prompt for _, prompt in shown),
            preview_interval(request, every, len(shown)),
            on_message,
            on_stage,
        )


def forgotten(
    loaded: LoadedModel, requests: Sequence[Request], preview_every: int = 0
) -> tuple[LoadedModel, list[StepReport]]:
    """The model after the requests, one after another, and a report on each; shown on the node that runs."""
    store, networks = StepStore(_folders.store_folder()), HostNetworks(loaded)
    value, reports = loaded.value, []
    watch = _Watch(loaded, requests, preview_every)
    with _host.normal_tensors(), ExitStack() as until_the_last:

        @cache
        def device() -> torch.device:
            """The device to train on, held from the first step that must be trained to the last of all."""
            return until_the_last.enter_context(_host.training_device(networks.free))

        def train(model: UnlearnModel, request: Request, state_store: StateStore):
            kept = {"store": store.anchors, "networks": networks, "text_sums": store.texts}
            watched = {"callbacks": watch.callbacks(request), "state_store": state_store}
            return run_step(model, request, device=device(), **kept, **watched)

        for request in requests:
            outcome = store.get_or_train(value, request, partial(train, value, request), watch.waiting())
            value = outcome.model
            reports.append(outcome.report)
            watch.finished(request, outcome.report, outcome.note)
    return loaded.with_value(value), reports


def _forget(loaded: LoadedModel, requests: Sequence[Request], preview_every: int) -> io.NodeOutput:
    result, reports = forgotten(loaded, requests, preview_every)
    plot = loss_curve("Loss", [loss for report in reports for loss in report.losses])
    text = "\n\n".join(map(step_text, reports))
    return io.NodeOutput(result, *_host.native(result), text, _host.to_image_tensor(plot))


class UnlearnStep(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_UnlearnStep",
            display_name="Unlearn Step",
            category="unlearning",
            description="Makes the model forget the concepts and gives out the edited model. Chain several "
            "to forget one request after another. A finished step is kept: the same graph takes "
            "it instead of computing it again, after a restart too.",
            inputs=[
                model_input(
                    "model", tooltip="Model to edit, from Load Model for Unlearning or from the step before."
                ),
                Concepts.Input("concepts", tooltip="Concepts to forget and to keep, from Concept to Forget."),
                *_how_to_train(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, model, concepts, preset, train_seed, preview_every, method=None, regularizers=None, training=None
    ):
        request = _request(model, concepts, preset, train_seed, method, regularizers, training)
        return _forget(model, [request], preview_every)


class UnlearnSequence(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_UnlearnSequence",
            display_name="Unlearn Sequence",
            category="unlearning",
            description="Forgets a list of requests one after another, as a chain of Unlearn Steps would. "
            "Every finished line is kept: adding a line at the end computes only that line.",
            inputs=[
                model_input(
                    "model", tooltip="Model to edit, from Load Model for Unlearning or from an Unlearn Step."
                ),
                io.String.Input(
                    "requests",
                    default="",
                    multiline=True,
                    placeholder="Candy Stripes\nNeon Cyan\nobject: cat -> tree",
                    tooltip="Requests, one per line: 'target', 'target -> anchor' or 'kind: target -> "
                    "anchor'. ' + ' joins concepts that are forgotten together. A line that begins "
                    "with # is left out.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="style",
                    tooltip=f"For lines that give none. {KIND_TIP}",
                ),
                io.String.Input("anchor", default="", tooltip=f"For lines that give none. {ANCHOR_TIP}"),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    placeholder="what must stay, one per line",
                    tooltip=KEEP_TIP,
                ),
                *_how_to_train(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        requests,
        kind,
        anchor,
        keep,
        preset,
        train_seed,
        preview_every,
        method=None,
        regularizers=None,
        training=None,
    ):
        kept = ConceptList((), parse_keep(keep, kind))
        lists = [kept + ConceptList(targets) for targets in parse_requests(requests, kind, anchor)]
        steps = [
            _request(model, concepts, preset, train_seed, method, regularizers, training)
            for concepts in lists
        ]
        return _forget(model, steps, preview_every)


NODES = (UnlearnStep, UnlearnSequence)
