"""The one training loop: `run_step(model, request)` makes a new `UnlearnModel` and never touches its input."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .anchors import AnchorStore
from .bundle import ModelBundle, swapped_weights
from .chain import StepRecord, UnlearnModel, library_versions, weights_of
from .compute import Compute
from .concepts import LONGEST_PROMPT, Concept, check_count, check_text
from .config import Config, TrainingConfig, check_number, check_object, stable_hash
from .diffusion import NoiseSchedule, SamplerConfig, generator_for, sample_latents
from .errors import Cancelled, ConfigError, MemoryShortError, TrainingError, shown
from .estimate import free_memory, planned
from .loading import BundleCache
from .masters import Masters
from .memory import release_memory
from .methods import METHODS
from .methods.base import Method, StepContext
from .params import group_names, is_kv
from .regularizers import REGULARIZERS
from .regularizers.base import Regularizer
from .resume import Loop, StateKeeper
from .stopping import EarlyStopping, Measure
from .student import Student, out_of_memory

logger = logging.getLogger(__name__)
_PREVIEW_SAMPLER = SamplerConfig(steps=8)
_MOST_PROMPTS = 100_000


@dataclass(frozen=True)
class Request:
    """One forgetting step: what, how, with which restraint, and how to train.

    Args:
        concepts: forgotten together in this step.
        method: config of a registered method.
        regularizers: configs of registered regularizers; their hooks run in this order.
        training: iterations, batch, learning rate, parameter group, seed.
        retain: concepts declared as to be kept.
        anchor_prompts: prompts whose pictures, made by the pretrained model, serve as anchors.
        anchor_count: number of anchor latents; prompts repeat in turn.
        anchor_sampler: how they are sampled.
        anchor_seed: their seed; apart from the training seed, so that runs share them.
    """

    concepts: tuple[Concept, ...]
    method: Config
    regularizers: tuple[Config, ...] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    retain: tuple[Concept, ...] = ()
    anchor_prompts: tuple[str, ...] = ()
    anchor_count: int = 100
    anchor_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    anchor_seed: int = 0

    def __post_init__(self):
        if not self.concepts:
            raise ConfigError("The request names no concept; give at least one target.")
        for name, kind in (("concepts", Concept), ("retain", Concept), ("regularizers", Config), ("anchor_prompts", str)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise ConfigError(f"{name} of the request is {shown(values)}; give a tuple of type {kind.__name__}.")
        for name, kind in (("training", TrainingConfig), ("anchor_sampler", SamplerConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} of the request is {shown(getattr(self, name))}; give a {kind.__name__}.")
        check_count("names to forget", self.concepts)
        check_count("names to keep", self.retain)
        check_count("anchor prompts", self.anchor_prompts, _MOST_PROMPTS)
        check_number("anchor_count", self.anchor_count, 1, 10_000, int)
        check_number("anchor_seed", self.anchor_seed, 0, 2**64 - 1, int)
        for concept in self.concepts:
            concept.check_forgettable()
        for prompt in self.anchor_prompts:
            check_text("anchor prompt", prompt, LONGEST_PROMPT)
        if not self.anchor_prompts:
            raise ConfigError("The request has no anchor prompts; give some captions of pictures that must stay.")
        METHODS.of(self.method)
        for config in self.regularizers:
            REGULARIZERS.of(config)

    def to_json(self) -> dict[str, Any]:
        return {
            "concepts": [concept.to_json() for concept in self.concepts],
            "method": self.method.to_json(),
            "regularizers": [config.to_json() for config in self.regularizers],
            "training": self.training.to_json(),
            "retain": [concept.to_json() for concept in self.retain],
            "anchor_prompts": list(self.anchor_prompts),
            "anchor_count": self.anchor_count,
            "anchor_sampler": self.anchor_sampler.to_json(),
            "anchor_seed": self.anchor_seed,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        check_object("request", values, [field.name for field in fields(cls)])
        for name in ("concepts", "regularizers", "retain", "anchor_prompts"):
            if not isinstance(values[name], list | tuple):
                raise ConfigError(f"{name} of the request is {shown(values[name])}; give a list.")
        return cls(
            concepts=tuple(map(Concept.from_json, values["concepts"])),
            method=METHODS.from_json(values["method"]),
            regularizers=tuple(map(REGULARIZERS.from_json, values["regularizers"])),
            training=TrainingConfig.from_json(values["training"]),
            retain=tuple(map(Concept.from_json, values["retain"])),
            anchor_prompts=tuple(values["anchor_prompts"]),
            anchor_count=values["anchor_count"],
            anchor_sampler=SamplerConfig.from_json(values["anchor_sampler"]),
            anchor_seed=values["anchor_seed"],
        )

    @property
    def hash(self) -> str:
        return stable_hash(self.to_json())


@dataclass(frozen=True)
class Progress:
    """State of a running step, handed to callbacks after every update."""

    iteration: int
    iterations: int
    loss: float
    parts: Mapping[str, float]
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.iteration * (self.iterations - self.iteration)


@dataclass(frozen=True)
class Callbacks:
    """How a caller watches and stops a step. The core itself never prints.

    Args:
        on_progress: called after every update.
        should_stop: asked before every update, anchor batch and prediction of the teacher; true ends the step. It may also raise.
        on_anchors: called with (anchor pictures made, their number).
        on_preview: called with (iteration, latents (n, c, h, w) of `preview_prompts` as the model draws them now), always from
            the same noise, before the first update, after every `preview_every` and after the last.
        preview_prompts: what previews show.
        preview_every: updates between previews; 0 turns them off.
        on_message: called with a sentence for the user, such as what the step needs, or what is done about short memory.
    """

    on_progress: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    on_anchors: Callable[[int, int], None] = lambda done, count: None
    on_preview: Callable[[int, Tensor], None] = lambda iteration, latents: None
    preview_prompts: tuple[str, ...] = ()
    preview_every: int = 0
    on_message: Callable[[str], None] = lambda text: None

    def preview(self, bundle: ModelBundle, iteration: int, iterations: int) -> None:
        """Sample and hand over a preview if it is time for one."""
        if self.preview_every and self.preview_prompts and (iteration % self.preview_every == 0 or iteration == iterations):
            generators = [generator_for(0, "preview", i) for i in range(len(self.preview_prompts))]
            batch_size = min(len(generators), bundle.family.sampling_batch)
            latents = sample_latents(bundle, self.preview_prompts, generators, _PREVIEW_SAMPLER, batch_size=batch_size)
            self.on_preview(iteration, latents)


@dataclass(frozen=True)
class StepReport:
    """What a step did: its record, the loss of every update, and the regularizers' figures."""

    record: StepRecord
    losses: tuple[float, ...]
    figures: Mapping[str, float]


def run_step(
    model: UnlearnModel, request: Request, *, device: torch.device | str = "cpu", callbacks: Callbacks | None = None,
    store: AnchorStore | None = None, bundles: BundleCache | None = None, measure: Measure | None = None,
    keeper: StateKeeper | None = None, compute: Compute | None = None,
) -> tuple[UnlearnModel, StepReport]:  # fmt: skip
    """Forget `request.concepts`: (the edited model, a report). Same seed, device and versions give the same bits on a CPU.

    Args:
        model: where the step begins; not changed.
        request: what to forget and how.
        device: where to compute.
        callbacks: progress and cancelling.
        store: anchor latents shared between steps; made here if not given.
        bundles: loaded models shared between steps.
        measure: how early stopping measures, if the request asks for it.
        keeper: where the state stays of which a step that is stopped goes on, to the same bits as one that is not.
        compute: precision, and what to do about memory.

    Raises:
        ConceptError: a target cannot be forgotten as described.
        ConfigError: settings that do not fit this model.
        TrainingError: a loss or weight became NaN or infinite, or early stopping measured nothing.
        MemoryShortError: the device's memory is too short; the state that is kept then is a good one.
        Cancelled: `callbacks.should_stop` said so.
    """
    callbacks, store, bundles, compute = callbacks or Callbacks(), store or AnchorStore(), bundles or BundleCache(), compute or Compute()
    begun = time.monotonic()
    _check_supported(model, request)
    stopping = EarlyStopping(request.training, measure)
    bundle = bundles.get(model.source, device, compute.dtype_on(device))
    try:
        edits, drift, losses, parts, figures, earlier = _step(model, request, bundle, callbacks, store, stopping, keeper, compute)
    except torch.OutOfMemoryError:
        is_short = True  # what the step held is free only when its frames are, after this block
    else:
        is_short = False
    if is_short:
        release_memory(bundle.device)
        raise MemoryShortError(out_of_memory(bundle, is_checkpointed=True))
    result = UnlearnModel(model.source, model.family, edits)
    record = StepRecord(
        request=request.to_json(), losses=parts, drift=drift, parent=model.content_hash, result=result.content_hash,
        seconds=round(earlier + time.monotonic() - begun, 3), finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )  # fmt: skip
    logger.info("forgot %d concept(s) in %.1f s", len(request.concepts), record.seconds)
    return result.with_history((*model.history, record)), StepReport(record, tuple(losses), figures)


def _step(
    model: UnlearnModel, request: Request, bundle: ModelBundle, callbacks: Callbacks, store: AnchorStore, stopping: EarlyStopping,
    keeper: StateKeeper | None, compute: Compute,
) -> tuple[dict[str, Tensor], dict[str, list[float]], list[float], dict[str, float], dict[str, float], float]:  # fmt: skip
    """(edits of the new model, drift by name, loss of every update, last value of each part of the loss, figures, seconds of earlier
    runs).
    """
    names = group_names(bundle.unet, request.training.group)
    compute, is_offloaded = _planned(model, bundle, request, compute, callbacks)
    home = torch.device("cpu") if is_offloaded else bundle.device
    pretrained = {name: weight.to(home) for name, weight in bundle.exact(names).items()}
    start = weights_of(model, pretrained)
    outside = {name: delta for name, delta in model.edits.items() if name not in pretrained}
    method = METHODS.of(request.method).cls(request.method)
    regularizers = [REGULARIZERS.of(config).cls(config) for config in request.regularizers]
    if any(part.needs_anchor_latents for part in (method, *regularizers)):
        latents = store.anchor_latents(
            model.source, bundle, request.anchor_prompts, request.anchor_count, request.anchor_sampler, request.anchor_seed,
            should_stop=callbacks.should_stop, on_batch=callbacks.on_anchors,
        )  # fmt: skip
    else:
        latents = torch.empty(0, *bundle.family.latent_shape)
    context = StepContext(
        bundle=bundle, concepts=request.concepts, retain=request.retain,
        previous=tuple(Concept.from_json(values) for values in model.forgotten),
        anchor_prompts=tuple(request.anchor_prompts[i % len(request.anchor_prompts)] for i in range(request.anchor_count)),
        anchor_latents=latents.to(bundle.device), pretrained=pretrained, start=start, training=request.training,
        generator=partial(generator_for, request.training.seed),
        schedule=NoiseSchedule(ends_in_noise=bundle.family.ends_in_noise),
        origin=stable_hash([model.content_hash, request.method.to_json()]), check=partial(_check_going_on, callbacks),
        anchor_sampler=request.anchor_sampler,
    )  # fmt: skip
    edited = {name: weight + outside[name].to(weight.device) for name, weight in bundle.exact(list(outside)).items()}
    with swapped_weights(bundle.unet, edited):
        for part in (method, *regularizers):
            part.prepare(context)
        if method.is_closed_form:
            weights, losses, parts, earlier = method.edit(context), [], {}, 0.0
        else:
            weights, losses, parts, earlier = _train(context, method, regularizers, callbacks, stopping, keeper, compute, is_offloaded)
    figures = {name: value for regularizer in regularizers for name, value in regularizer.report().items()} | stopping.figures

    edits, drift = dict(outside), {}
    for name in names:
        weight = weights[name].to(home)
        delta = (weight - pretrained[name]).cpu().contiguous()
        if not torch.isfinite(delta).all():
            raise TrainingError(f"Weight {name!r} is not finite after the step; lower the learning rate "
                                f"({request.training.learning_rate:g}).")  # fmt: skip
        if delta.any():
            edits[name] = delta
            drift[name] = [delta.norm().item(), (weight - start[name]).norm().item()]
    return edits, drift, losses, parts, figures, earlier


def _planned(
    model: UnlearnModel, bundle: ModelBundle, request: Request, compute: Compute, callbacks: Callbacks
) -> tuple[Compute, bool]:  # fmt: skip
    """(how to compute, whether masters rest in the CPU's memory), chosen for the free memory; the user is told what that needs."""
    free = free_memory(bundle.device)
    if free is not None:
        free += sum(weight.numel() * weight.element_size() for weight in bundle.unet.parameters())  # is there, and counted in the estimate
    compute, is_offloaded, estimate = planned(bundle.family, request, bundle.device, compute, free, bool(model.edits))
    if estimate is not None:
        callbacks.on_message(estimate.sentence(free))
    return compute, is_offloaded


def _check_supported(model: UnlearnModel, request: Request) -> None:
    for registry, config in [(METHODS, request.method), *((REGULARIZERS, config) for config in request.regularizers)]:
        entry = registry.of(config)
        for value, allowed, what in (
            (model.family.name, entry.families, "model family"),
            (request.training.group, entry.groups, "parameter group"),
        ):
            if value not in allowed:
                raise ConfigError(f"{entry.display_name} does not support {what} {value!r}; it supports {', '.join(allowed)}.")


def _check_going_on(callbacks: Callbacks) -> None:
    if callbacks.should_stop():
        raise Cancelled("Cancelled before the first update; the input model is unchanged.")


def _coordinates(regularizers: list[Regularizer], name: str) -> Tensor | None:
    """The basis in which the change of a matrix is limited, whichever regularizer limits it.

    Raises:
        ConfigError: two of them do, so that no mask can respect both.
    """
    found = [basis for regularizer in regularizers if (basis := regularizer.coordinates(name)) is not None]
    if len(found) > 1:
        raise ConfigError(f"{len(found)} regularizers limit the directions of {name!r}, and no mask can respect them all; keep one of "
                          "them, and give it everything that should stay.")  # fmt: skip
    return found[0] if found else None


def _train(
    context: StepContext, method: Method, regularizers: list[Regularizer], callbacks: Callbacks, stopping: EarlyStopping,
    keeper: StateKeeper | None, compute: Compute, is_offloaded: bool,
) -> tuple[dict[str, Tensor], list[float], dict[str, float], float]:  # fmt: skip
    """(new weights, the best if they were measured; loss of every update; last value of each part of the loss; seconds of training that
    earlier runs have spent on it).
    """
    training, unet = context.training, context.bundle.unet
    parameters = {name: parameter for name, parameter in unet.named_parameters() if name in context.start}
    generator = context.generator("batches")
    student = Student(context.bundle, compute, callbacks.on_message)

    def stop_if_asked() -> None:
        if callbacks.should_stop():
            raise Cancelled(f"Cancelled at iteration {iteration} of {training.iterations}; the input model is unchanged.")

    def teacher(weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        stop_if_asked()  # whole pictures may be sampled by a teacher within one update
        with torch.no_grad(), swapped_weights(unet, weights):
            return student(*inputs)

    blocked = [module for name, module in unet.named_modules() if method.blocks_first_token and is_kv(f"{name}.weight")]
    pretrained, start = partial(teacher, context.pretrained), partial(teacher, context.start)

    def terms() -> Iterator[tuple[Tensor, Mapping[str, float]]]:
        """(what to minimize, its named parts), one after the other: each is made after the backward of the one before, so that no
        teacher is called in between and one graph at a time is in memory."""
        with _first_token_blocked(blocked):  # until the backward is done, which may run the network again
            loss = method.loss(student, pretrained if method.teacher_is_pretrained else start, generator)
            total = loss.total
            for regularizer in regularizers:
                if (penalty := regularizer.penalty(masters.weights)) is not None:
                    total = total + penalty
            yield total, loss.parts
        for regularizer in regularizers:
            if named := regularizer.loss_terms(student, pretrained, start):
                yield sum(named.values()), {name: term.item() for name, term in named.items()}

    with _student_weights(context, parameters):
        masters = Masters(parameters, context.start, training, is_offloaded)
        optimizer = masters.optimizer
        with masters.collecting(), student.ready():
            with _first_token_blocked(blocked):
                for part in (method, *regularizers):
                    part.prepare_mask(context, partial(_coordinates, regularizers))
            loop = Loop(masters, generator, (method, *regularizers, stopping), keeper)

            def is_over() -> bool:
                """Measures and shows what the last update made, if it is time to; whether it was the last of all."""
                done, iterations = loop.iteration, training.iterations
                if not done:
                    return not iterations
                is_last = stopping.is_time(done, context.bundle, masters.weights, stop_if_asked) or done == iterations
                callbacks.preview(context.bundle, done, done if is_last else iterations)
                return is_last

            callbacks.preview(context.bundle, 0, training.iterations)
            with loop.kept(training.iterations):
                iteration = loop.iteration
                while not is_over():
                    iteration = loop.iteration + 1
                    stop_if_asked()
                    context.bundle.free_text_encoders()  # all prompts are encoded by now, but for a caller's own
                    if training.schedule == "linear":
                        optimizer.param_groups[0]["lr"] = training.learning_rate * (1 - (iteration - 1) / training.iterations)
                    total, parts = 0.0, {}
                    for term, named in terms():
                        total += term.item()
                        if not math.isfinite(total):
                            raise TrainingError(f"The loss became {total} at iteration {iteration} of {training.iterations}; lower the "
                                                f"learning rate ({training.learning_rate:g}) or the regularizers' strengths.")  # fmt: skip
                        student.backward(term, masters)
                        parts |= named
                    loop.change()
                    if not masters.gather():
                        for part in (method, *regularizers):
                            part.update_skipped(iteration)
                    elif method.after_backward(iteration, masters.weights, optimizer):
                        where = masters.device, masters.on_device
                        _update(masters.weights, optimizer, method, regularizers, training, *where)
                    else:
                        optimizer.zero_grad()
                    loop.advance(total, parts)
                    callbacks.on_progress(Progress(iteration, training.iterations, total, parts, loop.seconds))
            return stopping.weights or masters.values(), loop.losses, loop.terms, loop.earlier_seconds


@torch.no_grad()
def _update(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, method: Method, regularizers: list[Regularizer],
    training: TrainingConfig, device: torch.device | str = "cpu",
    on_device: Callable[[str], AbstractContextManager] = nullcontext,
) -> None:  # fmt: skip
    """One constrained optimizer update. The order is a contract: gradients, clipping, optimizer, proximal, then hard constraints.

    After clipping the tensors are updated one by one, so that only one is held twice. Each is on `device` within `on_device` of its name.
    """
    for name, parameter in parameters.items():
        gradient = parameter.grad.to(device)
        for part in (method, *regularizers):
            gradient = part.transform_gradient(name, gradient)
        parameter.grad = gradient.to(parameter.device)
    if training.max_grad_norm:
        nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
    (group,) = optimizer.param_groups
    try:
        for name, parameter in parameters.items():
            with on_device(name):
                before = parameter.detach().clone()
                group["params"] = [parameter]
                optimizer.step()
                parameter.grad = None
                parameter.data.copy_(before + _allowed(name, before, parameter.data, group["lr"], method, regularizers))
    finally:
        group["params"] = list(parameters.values())


def _allowed(
    name: str, before: Tensor, weight: Tensor, learning_rate: float, method: Method, regularizers: list[Regularizer]
) -> Tensor:  # fmt: skip
    """The change of a weight that proximal steps, masks and hard constraints leave of what the optimizer did."""
    for regularizer in regularizers:
        weight = regularizer.proximal(name, weight, learning_rate)
    masks = [mask for part in (method, *regularizers) if (mask := part.mask(name, weight)) is not None]
    mask = math.prod(masks[1:], start=masks[0]) if masks else None
    change = weight - before
    constrained = None
    for regularizer in regularizers:
        allowed = regularizer.constrain(name, change if constrained is None else constrained, mask)
        constrained = constrained if allowed is None else allowed
    if constrained is None:
        constrained = change if mask is None else change * mask
    return constrained


@contextmanager
def _student_weights(context: StepContext, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block the UNet holds the step's start, in weights that may change; then W0 again."""
    if context.bundle.dtype == torch.float32:
        with swapped_weights(context.bundle.unet, {name: weight.clone() for name, weight in context.start.items()}):
            yield
        return
    try:  # in place: W0 is rounded in the UNet, and exact elsewhere
        for name, parameter in parameters.items():
            parameter.data.copy_(context.start[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(context.pretrained[name])


@contextmanager
def _first_token_blocked(modules: list[nn.Module]) -> Iterator[None]:
    """Gradients do not flow through row 0 (the start token) of these key and value projections."""

    def block(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    handles = [module.register_forward_hook(block) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
