"""Run one unlearning step: `run_step(model, request)` returns a new `UnlearnModel`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from ..base.config import stable_hash
from ..base.errors import Cancelled, ConfigError, MemoryShortError, TrainingError, brief_repr
from ..base.last_result import LastResult
from ..concepts.concept import Concept
from ..history.step_record import StepRecord, library_versions
from ..history.unlearn_model import UnlearnModel, weights_of
from ..methods import METHODS
from ..models.free_memory import free_memory, is_out_of_memory, release_memory
from ..models.load_diffusers import NetworkCache
from ..models.network import Network, Networks
from ..models.sampling import generator_for
from ..models.weight_roles import READING_TEXT, ROLES
from ..parts.part import Part
from ..parts.step_context import SolvedSet, StepContext, TextSums, made_anew
from ..regularizers import REGULARIZERS
from ..requests.request import Request
from .anchor_images import AnchorSource, DrawnAnchors
from .callbacks import Callbacks
from .compute import Compute
from .data_parallel import Processes
from .early_stopping import EarlyStopping, Measure
from .loop import Trained, train
from .memory_plan import planned
from .micro_batches import out_of_memory
from .resume import StateStore
from .seen_tokens import SeenTokens, check_anchors, without_targets
from .shared_sources import SharedAnchors, SharedStates
from .solved_chain import solved_set

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """Report of a step: its record, the total loss of every update, and the parts' figures by name."""

    record: StepRecord
    losses: tuple[float, ...]
    figures: Mapping[str, float]


def run_step(
    model: UnlearnModel,
    request: Request,
    *,
    device: torch.device | str = "cpu",
    callbacks: Callbacks | None = None,
    store: AnchorSource | None = None,
    networks: Networks | None = None,
    measure: Measure | None = None,
    state_store: StateStore | None = None,
    compute: Compute | None = None,
    text_sums: TextSums = made_anew,
    processes: Processes | None = None,
) -> tuple[UnlearnModel, StepReport]:
    """Forget `request.concepts`: (edited model, report).

    On a CPU, the same seed and versions give the same bits, also for a step that was stopped and resumed.

    Args:
        model: the step's start, which is not changed.
        request: what to forget and how.
        device: on which to compute.
        callbacks: progress and cancelling.
        store: provides anchor latents; without it they are sampled anew.
        networks: loaded networks shared between steps.
        measure: how early stopping measures, if the request uses it.
        state_store: stores the state from which a stopped step resumes.
        compute: precision and memory settings.
        text_sums: keeps sums over encoded text between runs.
        processes: that train the step together; all call this function alike, and all have its result.

    Raises:
        ConceptError: a target cannot be forgotten as described.
        ConfigError: the settings do not fit this model.
        TrainingError: a loss or weight became NaN or infinite, or early stopping measured nothing.
        MemoryShortError: the device's memory is too short; the stored state is valid, so the step can resume.
        Cancelled: `callbacks.should_stop` returned true.
    """
    callbacks, store, networks = callbacks or Callbacks(), store or DrawnAnchors(), networks or NetworkCache()
    compute, begun = compute or Compute(), time.monotonic()
    processes = processes or Processes()
    if processes.count > 1:
        store, state_store = SharedAnchors(store, processes), SharedStates(state_store, processes)
    _check_supported(model, request)
    solves_chain = METHODS.of(request.method).cls.solves_chain
    solved = solved_set(model, request) if solves_chain else SolvedSet()
    if request.training.iterations and METHODS.of(request.method).cls.is_closed_form:
        name = METHODS.of(request.method).display_name
        callbacks.on_message(f"{name} trains nothing: iterations and learning rate are not used.")
    stopping = EarlyStopping(request.training, measure)
    network = networks.get(model.source, device, compute.dtype_on(device))
    step = _Step(
        model,
        request,
        network,
        callbacks,
        store,
        stopping,
        state_store,
        networks.last_result,
        solved,
        text_sums,
        processes,
    )
    try:
        trained, edits, drift, figures = step.run(compute)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        is_short = True  # the traceback keeps the step's tensors alive until this block ends
    else:
        is_short = False
    if is_short:
        release_memory(network.device)
        raise MemoryShortError(out_of_memory(network, is_checkpointed=True))
    result = UnlearnModel(model.source, model.family, edits)
    record = StepRecord(
        request=request.to_json(),
        losses=dict(trained.terms or {}),
        drift=drift,
        parent=model.content_hash,
        result=result.content_hash,
        seconds=round(trained.earlier_seconds + time.monotonic() - begun, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )
    did = "forgot" if record.has_changed else "changed nothing for"
    logger.info("%s %d concept(s) in %.1f s", did, len(request.concepts), record.seconds)
    report = StepReport(record, tuple(trained.losses), figures)
    return result.with_history((*model.history, record)), report


@dataclass(frozen=True)
class _Step:
    """One step on a loaded network; see `run_step`."""

    model: UnlearnModel
    request: Request
    network: Network
    callbacks: Callbacks
    store: AnchorSource
    stopping: EarlyStopping
    state_store: StateStore | None
    last_result: LastResult
    solved: SolvedSet
    text_sums: TextSums
    processes: Processes

    def run(
        self, compute: Compute
    ) -> tuple[Trained, dict[str, Tensor], dict[str, list[float]], dict[str, float]]:
        """(result of training, edits of the new model, drift by key, figures of the parts)."""
        request, network = self.request, self.network
        keys = list(network.weights(request.role))
        compute, is_offloaded = self._planned(compute)
        storage_device = torch.device("cpu") if is_offloaded else network.device
        pretrained = {key: weight.to(storage_device) for key, weight in network.exact(keys).items()}
        start = weights_of(self.model, pretrained)
        outside = {key: delta for key, delta in self.model.edits.items() if key not in pretrained}
        parts = request.parts()
        method, *regularizers = parts
        context = self._context(parts, pretrained, start)
        held = network.exact(list(outside)).items()
        with network.with_weights({key: weight + outside[key].to(weight.device) for key, weight in held}):
            for part in parts:
                part.prepare(context)
            trained = train(
                context,
                method,
                regularizers,
                self.callbacks,
                self.stopping,
                self.state_store,
                compute,
                is_offloaded,
                self.processes,
            )
        edits, drift = dict(outside), {}
        for key in keys:
            weight = trained.weights[key].to(storage_device)
            delta = (weight - pretrained[key]).cpu() if trained.edits is None else trained.edits.get(key)
            if delta is None:
                continue
            if not torch.isfinite(delta).all():
                raise TrainingError(
                    f"Weight {key!r} is not finite after the step; lower the learning rate "
                    f"({request.training.learning_rate:g})."
                )
            if delta.any():
                edits[key] = delta.contiguous()
                drift[key] = [delta.norm().item(), (weight - start[key]).norm().item()]
        figures = {name: value for part in parts for name, value in part.report().items()}
        return trained, edits, drift, figures | self.stopping.figures

    def _context(
        self, parts: Sequence[Part], pretrained: dict[str, Tensor], start: dict[str, Tensor]
    ) -> StepContext:
        request, network, prompts = self.request, self.network, self.request.anchor_prompts
        if any("autoencoder" in part.needs for part in parts):
            network.check_autoencoder()
        seen = SeenTokens(network)
        retain = without_targets(seen, request.retain, request.concepts)
        if "anchor_latents" in parts[0].needs:
            for sentence in check_anchors(seen, request.concepts, prompts):
                self.callbacks.on_message(sentence)
        latents = torch.empty(0, *network.family.latent_shape)
        if any("anchor_latents" in part.needs for part in parts):
            latents = self.store.anchor_latents(
                self.model.source,
                network,
                prompts,
                request.anchor_count,
                request.anchor_sampler,
                request.anchor_seed,
                should_stop=self.callbacks.should_stop,
                on_batch=self.callbacks.on_anchors,
                on_message=self.callbacks.on_message,
            )
        return StepContext(
            network=network,
            concepts=request.concepts,
            retain=retain,
            previous=self._previous,
            anchor_prompts=tuple(prompts[i % len(prompts)] for i in range(request.anchor_count)),
            anchor_latents=latents.to(network.device),
            pretrained=pretrained,
            start=start,
            training=request.training,
            generator=partial(generator_for, request.training.seed),
            origin=stable_hash([self.model.content_hash, request.method.to_json()]),
            check=self._check_going_on,
            anchor_sampler=request.anchor_sampler,
            last_result=self.last_result,
            source=self.model.source.sha256,
            solved=self.solved,
            say=self.callbacks.on_stage,
            text_sums=self.text_sums,
        )

    @property
    def _previous(self) -> tuple[Concept, ...]:
        return tuple(Concept.from_json(values) for values in self.model.forgotten)

    def _planned(self, compute: Compute) -> tuple[Compute, bool]:
        """(compute, whether master weights are offloaded), chosen for the free memory.

        The estimate is sent to the user by `on_message`.
        """
        network, model = self.network, self.model
        if METHODS.of(self.request.method).cls.is_closed_form:  # it works on the CPU, a matrix at a time
            return compute, compute.dtype_on(network.device) != torch.float32
        free = free_memory(network.device)
        if free is not None:
            # the network's weights are loaded already, and the estimate counts them too
            free += sum(weight.numel() * weight.element_size() for weight in network.weights("all").values())
        compute, is_offloaded, estimate = planned(
            network, self.request, network.device, compute, free, self._previous, bool(model.edits)
        )
        if estimate is not None:
            self.callbacks.on_message(estimate.sentence(free))
        return compute, is_offloaded

    def _check_going_on(self) -> None:
        if self.callbacks.should_stop():
            raise Cancelled("Cancelled before the first update; the input model is unchanged.")


def _check_supported(model: UnlearnModel, request: Request) -> None:
    """Raises ConfigError for a part that cannot work in this step, before anything is loaded or sampled."""
    method_entry = METHODS.of(request.method)
    entries = [(method_entry, request.method)]
    entries += [(REGULARIZERS.of(config), config) for config in request.regularizers]
    for entry, config in entries:
        part, group = entry.cls(config), request.training.group
        if "text_readers" in part.needs and group not in READING_TEXT:
            raise ConfigError(
                f"{entry.display_name} does not support parameter group {group!r}; it supports "
                f"{', '.join(READING_TEXT)}."
            )
        if missing := [need for need in part.needs if need in ROLES and need not in model.family.roles]:
            raise ConfigError(
                f"{entry.display_name} does not support {model.family.display_name}, which has no "
                f"{missing[0].replace('_', ' ')}; choose another one."
            )
        is_idle = (
            method_entry.cls.is_closed_form and entry is not method_entry and not part.acts_on_closed_form
        )
        if is_idle:
            raise ConfigError(
                f"{entry.display_name} cannot restrain {method_entry.display_name}, whose closed-form edit "
                f"has no updates for it to act on ({brief_repr(config.to_json())}); leave it out, choose "
                "its form 'update' where it has one, or a method that trains, as the preset 'trained' does."
            )
