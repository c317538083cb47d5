"""A chain of closed-form requests as a set: what is solved anew with each request, and what is taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..base.errors import ConceptError, ConfigError, brief_repr
from ..concepts.concept import Concept, display_name
from ..history.step_record import StepRecord
from ..history.unlearn_model import UnlearnModel, weights_of
from ..methods import METHODS
from ..methods.base import Method
from ..models.load_diffusers import NetworkCache
from ..models.network import Network, Networks
from ..models.sampling import generator_for
from ..parts.step_context import SolvedRequest, SolvedSet, StepContext, TextSums, made_anew
from ..requests.request import Request


def solved_request(request: Request) -> SolvedRequest:
    """What a method that solves a chain needs of a request."""
    return SolvedRequest(request.concepts, request.retain, request.anchor_prompts, request.method)


def is_solved(record: StepRecord) -> bool:
    """Whether a step is solved anew: its method solves chains, and no regularizer restrains it."""
    if record.is_merge or record.request["regularizers"]:
        return False
    entry = METHODS.find(record.request["method"]["name"])
    return entry is not None and entry.cls.solves_chain


def _begin(model: UnlearnModel) -> int:
    """Index of the first step in the history since the last merge, or since the model's source.

    A model that was opened without its pretrained file holds earlier steps in its source's weights.
    """
    pretrained, begin = UnlearnModel(model.source, model.family).content_hash, len(model.history)
    for index, record in enumerate(model.history if model.edits else ()):
        if record.is_merge:
            begin = index + 1
        elif record.parent == pretrained:
            begin = index
    return begin


def solved_records(model: UnlearnModel) -> list[int]:
    """Indices in the history of the steps that are solved anew and can be taken back, oldest first."""
    return [i for i in range(_begin(model), len(model.history)) if is_solved(model.history[i])]


def solved_set(model: UnlearnModel, request: Request | None = None) -> SolvedSet:
    """The requests of `model` that are solved anew, together with `request`.

    Raises:
        ConfigError: an earlier request was solved by another method, or with other settings that a chain
            shares.
        ConceptError: an earlier request has the same target.
    """
    begin, indices = _begin(model), solved_records(model)
    requests = [Request.from_json(model.history[i].request) for i in indices]
    if request is not None:
        for earlier in requests:
            _check_alike(earlier, request)
    is_after_merge = 0 < begin < len(model.history) and model.history[begin - 1].is_merge
    is_all = not model.edits or (not is_after_merge and begin + len(indices) == len(model.history))
    own = None if request is None else solved_request(request)
    return SolvedSet(tuple(map(solved_request, requests)), own, is_all)


def _check_alike(earlier: Request, request: Request) -> None:
    former, config = earlier.method, request.method
    shared = {name: getattr(former, name, None) for name in config.SHARED}
    is_other = type(former) is not type(config)
    different = {name: value for name, value in shared.items() if is_other or getattr(config, name) != value}
    if is_other or different:
        raise ConfigError(
            f"Earlier requests of this chain were solved by {former.registry_name} with "
            f"{brief_repr(different)}, and all are solved together; give this request the same method and "
            "settings, or take the earlier ones back."
        )
    names = {concept.name.lower() for concept in earlier.concepts}
    if again := [concept.name for concept in request.concepts if concept.name.lower() in names]:
        raise ConceptError(f"{again[0]!r} is already forgotten by an earlier request; leave it out.")


def others(method: Method, context: StepContext) -> dict[str, Tensor]:
    """Edits of the step's start that come from other steps than the solved ones, by key, on the CPU."""
    if context.solved.is_all:
        return {}
    former = method.solve(context, context.solved.earlier) if context.solved.earlier else {}
    edits = {}
    for key, start in context.start.items():
        edit = (start - context.pretrained[key]).cpu()
        edits[key] = edit - former[key] if key in former else edit
    return edits


def with_others(edits: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum of two sets of edits by key; a key that only one of them has keeps its bits."""
    both = {key: edits[key] + rest[key] for key in edits.keys() & rest.keys()}
    return {**edits, **rest, **both}


def take_back(
    model: UnlearnModel,
    names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    networks: Networks | None = None,
    check: Callable[[], None] = lambda: None,
    on_stage: Callable[[str], None] = lambda text: None,
    text_sums: TextSums = made_anew,
) -> UnlearnModel:
    """The model without the requests to forget `names`: all others are solved anew.

    If every step of the chain was solved, the weights are, bit for bit, those of a model that never had these
    requests. What trained steps changed stays as it is.

    Args:
        model: whose requests to take back; it is not changed.
        names: targets, as they were typed; upper and lower case are the same.
        device: of the network.
        networks: loaded networks shared with other steps.
        check: raises Cancelled if the caller wants to stop.
        on_stage: called with what is being done.
        text_sums: keeps sums over encoded text between runs.

    Raises:
        ConceptError: a name was not forgotten, or by a step that cannot be taken back exactly.
    """
    indices = solved_records(model)
    wanted = {display_name(name).lower(): name for name in names}
    here = {name for i in indices for name in _names(model.history[i])}
    for name, typed in wanted.items():
        if name not in here:
            raise ConceptError(_refusal(model, typed, name, sorted(here)))
    kept = {i: _without(model.history[i], wanted) for i in indices}
    remaining = [record for record in kept.values() if record is not None]
    networks = networks or NetworkCache()
    watch = {"check": check, "say": on_stage, "text_sums": text_sums}
    edits = _solved_anew(model, indices, remaining, device, networks, watch)
    result = UnlearnModel(model.source, model.family, edits)
    history = [kept.get(i, record) for i, record in enumerate(model.history)]
    history = _rechained([record for record in history if record is not None], model, result.content_hash)
    return result.with_history(history)


def forgotten_names(model: UnlearnModel) -> tuple[list[str], list[str]]:
    """(names that can be taken back, names that training or the model's own file has forgotten), in order."""
    solved = set(solved_records(model))
    names: tuple[list[str], list[str]] = [], []
    for i, record in enumerate(model.history):
        names[i not in solved].extend(Concept.from_json(c).name for c in record.request["concepts"])
    return list(dict.fromkeys(names[0])), list(dict.fromkeys(names[1]))


def _names(record: StepRecord) -> list[str]:
    return [Concept.from_json(concept).name.lower() for concept in record.request["concepts"]]


def _refusal(model: UnlearnModel, typed: str, name: str, here: Sequence[str]) -> str:
    if any(name in _names(record) for record in model.history):
        return (
            f"{typed!r} was forgotten by training, or in the file that the model was opened from, so it "
            "cannot be taken back exactly; start again from the model before that step."
        )
    known = f"what can be taken back: {', '.join(here[:20])}" if here else "nothing can be taken back here"
    return f"{typed!r} was not forgotten by this model; {known}."


def _without(record: StepRecord, wanted: Mapping[str, str]) -> StepRecord | None:
    """The record without these targets; None if it has no other."""
    pairs = zip(record.request["concepts"], _names(record), strict=True)
    concepts = [concept for concept, name in pairs if name not in wanted]
    return replace(record, request={**record.request, "concepts": concepts}) if concepts else None


def _solved_anew(
    model: UnlearnModel,
    indices: Sequence[int],
    remaining: Sequence[StepRecord],
    device: torch.device | str,
    networks: Networks,
    watch: Mapping[str, Callable],
) -> dict[str, Tensor]:
    requests = [Request.from_json(record.request) for record in remaining]
    first = Request.from_json(model.history[indices[0]].request)
    method = METHODS.of(first.method).cls(first.method)
    network = networks.get(model.source, device)
    context = replace(closed_form_context(model, first, network, networks), **watch)
    solved = method.solve(context, tuple(map(solved_request, requests))) if requests else {}
    outside = {key: edit for key, edit in model.edits.items() if key not in context.pretrained}
    edits = with_others(solved, others(method, context)) | outside
    return {key: edit for key, edit in edits.items() if edit.any()}


def closed_form_context(
    model: UnlearnModel,
    request: Request,
    network: Network,
    networks: Networks,
) -> StepContext:
    """Context of a closed-form solve on `model` without a step of its own."""
    pretrained = network.exact(list(network.weights(request.role)))
    return StepContext(
        network=network,
        concepts=(),
        retain=(),
        previous=(),
        anchor_prompts=(),
        anchor_latents=torch.empty(0),
        pretrained=pretrained,
        start=weights_of(model, pretrained),
        training=request.training,
        generator=partial(generator_for, request.training.seed),
        last_result=networks.last_result,
        source=model.source.sha256,
        solved=solved_set(model),
    )


def _rechained(history: Sequence[StepRecord], model: UnlearnModel, result: str) -> tuple[StepRecord, ...]:
    """The records in a row: a step's parent is the result of the one before it; the last gives `result`."""
    begin, records = _begin(model), list(history)
    for i in range(begin + 1, len(records)):
        records[i] = replace(records[i], parent=records[i - 1].result)
    if len(records) > begin:
        first = (
            UnlearnModel(model.source, model.family).content_hash if not begin else records[begin - 1].result
        )
        records[begin] = replace(records[begin], parent=first)
        records[-1] = replace(records[-1], result=result)
    return tuple(records)
