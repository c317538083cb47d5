"""The one training loop: `run_step(model, request)` makes a new `UnlearnModel` and never touches its
input."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from ..base.config import stable_hash
from ..base.errors import Cancelled, ConfigError, MemoryShortError, TrainingError
from ..base.last_result import LastResult
from ..concepts.concept import Concept
from ..history.step_record import StepRecord, library_versions
from ..history.unlearn_model import UnlearnModel, weights_of
from ..methods import METHODS
from ..models.free_memory import free_memory, is_out_of_memory, release_memory
from ..models.load_diffusers import NetworkCache
from ..models.network import Network
from ..models.sampling import generator_for
from ..models.weight_roles import READING_TEXT, ROLES, role_of
from ..parts.step_context import StepContext
from ..regularizers import REGULARIZERS
from ..requests.request import Request
from ..store.anchors import AnchorStore
from .callbacks import Callbacks
from .compute import Compute
from .early_stopping import EarlyStopping, Measure
from .loop import _train
from .memory_plan import planned
from .micro_batches import out_of_memory
from .resume import StateStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What a step did: its record, the loss of every update, and the regularizers' figures."""

    record: StepRecord
    losses: tuple[float, ...]
    figures: Mapping[str, float]


def run_step(
    model: UnlearnModel,
    request: Request,
    *,
    device: torch.device | str = "cpu",
    callbacks: Callbacks | None = None,
    store: AnchorStore | None = None,
    networks: NetworkCache | None = None,
    measure: Measure | None = None,
    state_store: StateStore | None = None,
    compute: Compute | None = None,
) -> tuple[UnlearnModel, StepReport]:
    """Forget `request.concepts`: (the edited model, a report). Same seed, device and versions give the same
    bits on a CPU.

    Args:
        model: where the step begins; not changed.
        request: what to forget and how.
        device: where to compute.
        callbacks: progress and cancelling.
        store: anchor latents shared between steps; made here if not given.
        networks: loaded models shared between steps.
        measure: how early stopping measures, if the request asks for it.
        state_store: where the state stays of which a step that is stopped goes on, to the same bits as one
            that is not.
        compute: precision, and what to do about memory.

    Raises:
        ConceptError: a target cannot be forgotten as described.
        ConfigError: settings that do not fit this model.
        TrainingError: a loss or weight became NaN or infinite, or early stopping measured nothing.
        MemoryShortError: the device's memory is too short; the state that is kept then is a good one.
        Cancelled: `callbacks.should_stop` said so.
    """
    callbacks, store, networks, compute = (
        callbacks or Callbacks(),
        store or AnchorStore(),
        networks or NetworkCache(),
        compute or Compute(),
    )
    begun = time.monotonic()
    _check_supported(model, request)
    stopping = EarlyStopping(request.training, measure)
    network = networks.get(model.source, device, compute.dtype_on(device))
    try:
        edits, drift, losses, parts, figures, earlier = _step(
            model, request, network, callbacks, store, stopping, state_store, compute, networks.last_result
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        is_short = True  # what the step held is free only when its frames are, after this block
    else:
        is_short = False
    if is_short:
        release_memory(network.device)
        raise MemoryShortError(out_of_memory(network, is_checkpointed=True))
    result = UnlearnModel(model.source, model.family, edits)
    record = StepRecord(
        request=request.to_json(),
        losses=parts,
        drift=drift,
        parent=model.content_hash,
        result=result.content_hash,
        seconds=round(earlier + time.monotonic() - begun, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )
    logger.info("forgot %d concept(s) in %.1f s", len(request.concepts), record.seconds)
    return result.with_history((*model.history, record)), StepReport(record, tuple(losses), figures)


def _step(
    model: UnlearnModel,
    request: Request,
    network: Network,
    callbacks: Callbacks,
    store: AnchorStore,
    stopping: EarlyStopping,
    state_store: StateStore | None,
    compute: Compute,
    last_result: LastResult,
) -> tuple[dict[str, Tensor], dict[str, list[float]], list[float], dict[str, float], dict[str, float], float]:
    """(edits of the new model, drift by name, loss of every update, last value of each part of the loss,
    figures, seconds of earlier runs).
    """
    names = list(network.weights(role_of(request.training.group)))
    compute, is_offloaded = _planned(model, network, request, compute, callbacks)
    home = torch.device("cpu") if is_offloaded else network.device
    pretrained = {name: weight.to(home) for name, weight in network.exact(names).items()}
    start = weights_of(model, pretrained)
    outside = {name: delta for name, delta in model.edits.items() if name not in pretrained}
    method = METHODS.of(request.method).cls(request.method)
    regularizers = [REGULARIZERS.of(config).cls(config) for config in request.regularizers]
    if any(part.needs_anchor_latents for part in (method, *regularizers)):
        latents = store.anchor_latents(
            model.source,
            network,
            request.anchor_prompts,
            request.anchor_count,
            request.anchor_sampler,
            request.anchor_seed,
            should_stop=callbacks.should_stop,
            on_batch=callbacks.on_anchors,
        )
    else:
        latents = torch.empty(0, *network.family.latent_shape)
    context = StepContext(
        network=network,
        concepts=request.concepts,
        retain=request.retain,
        previous=tuple(Concept.from_json(values) for values in model.forgotten),
        anchor_prompts=tuple(
            request.anchor_prompts[i % len(request.anchor_prompts)] for i in range(request.anchor_count)
        ),
        anchor_latents=latents.to(network.device),
        pretrained=pretrained,
        start=start,
        training=request.training,
        generator=partial(generator_for, request.training.seed),
        origin=stable_hash([model.content_hash, request.method.to_json()]),
        check=partial(_check_going_on, callbacks),
        anchor_sampler=request.anchor_sampler,
        last_result=last_result,
    )
    edited = {
        name: weight + outside[name].to(weight.device)
        for name, weight in network.exact(list(outside)).items()
    }
    with network.with_weights(edited):
        for part in (method, *regularizers):
            part.prepare(context)
        if method.is_closed_form:
            weights, losses, parts, earlier = method.edit(context), [], {}, 0.0
        else:
            weights, losses, parts, earlier = _train(
                context, method, regularizers, callbacks, stopping, state_store, compute, is_offloaded
            )
    figures = {
        name: value for regularizer in regularizers for name, value in regularizer.report().items()
    } | stopping.figures

    edits, drift = dict(outside), {}
    for name in names:
        weight = weights[name].to(home)
        delta = (weight - pretrained[name]).cpu().contiguous()
        if not torch.isfinite(delta).all():
            raise TrainingError(
                f"Weight {name!r} is not finite after the step; lower the learning rate "
                f"({request.training.learning_rate:g})."
            )
        if delta.any():
            edits[name] = delta
            drift[name] = [delta.norm().item(), (weight - start[name]).norm().item()]
    return edits, drift, losses, parts, figures, earlier


def _planned(
    model: UnlearnModel, network: Network, request: Request, compute: Compute, callbacks: Callbacks
) -> tuple[Compute, bool]:
    """(how to compute, whether masters rest in the CPU's memory), chosen for the free memory; the user is
    told what that needs."""
    free = free_memory(network.device)
    if free is not None:
        # is there, and counted in the estimate
        free += sum(weight.numel() * weight.element_size() for weight in network.weights("all").values())
    compute, is_offloaded, estimate = planned(
        network, request, network.device, compute, free, bool(model.edits)
    )
    if estimate is not None:
        callbacks.on_message(estimate.sentence(free))
    return compute, is_offloaded


def _check_supported(model: UnlearnModel, request: Request) -> None:
    for registry, config in [
        (METHODS, request.method),
        *((REGULARIZERS, config) for config in request.regularizers),
    ]:
        entry = registry.of(config)
        needs, group = entry.cls(config).needs, request.training.group
        if "text_readers" in needs and group not in READING_TEXT:
            raise ConfigError(
                f"{entry.display_name} does not support parameter group {group!r}; it supports "
                f"{', '.join(READING_TEXT)}."
            )
        if missing := [need for need in needs if need in ROLES and need not in model.family.roles]:
            raise ConfigError(
                f"{entry.display_name} does not support {model.family.display_name}, which has no "
                f"{missing[0].replace('_', ' ')}; choose another one."
            )


def _check_going_on(callbacks: Callbacks) -> None:
    if callbacks.should_stop():
        raise Cancelled("Cancelled before the first update; the input model is unchanged.")
