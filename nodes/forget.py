"""Forget: the one node between Load Checkpoint and KSampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image

from ..cul_core.base.errors import ConceptError, ConfigError
from ..cul_core.concepts.concept import Concept
from ..cul_core.concepts.parsing import parse_keep, parse_requests
from ..cul_core.history.unlearn_model import UnlearnModel
from ..cul_core.models.discrete_process import DiscreteProcess
from ..cul_core.models.family import Family
from ..cul_core.output.charts import labelled_grid
from ..cul_core.output.report import step_text
from ..cul_core.requests.presets import PRESETS
from ..cul_core.requests.previews import preview_prompts
from ..cul_core.requests.request import Request
from ..cul_core.requests.resolve import resolve
from . import _host
from ._node import UnlearningNode, search_aliases
from .load_model import deleted_snapshots, opened
from .unlearn import forgotten

_PRESETS = {"fast": "recommended", "thorough": "thorough"}
_NO_PICTURE_PX = 64


def _parsed(forget: str, keep: str) -> tuple[list[tuple[Concept, ...]], tuple[Concept, ...]]:
    """(the concepts of each request, those to keep).

    Raises:
        ConceptError: nothing is to be forgotten, a name is invalid or stands there twice.
    """
    requests, kept = parse_requests(forget), parse_keep(keep)
    seen: set[str] = set()
    for concept in (concept for targets in requests for concept in targets):
        concept.check_forgettable()
        if concept.name.lower() in seen:
            raise ConceptError(f"{concept.name!r} is to be forgotten twice; take one of the two lines out.")
        seen.add(concept.name.lower())
    if both := [concept.name for concept in kept if concept.name.lower() in seen]:
        raise ConceptError(f"{both[0]!r} is in both lists; take it out of one of them.")
    return requests, kept


class Forget(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_Forget",
            display_name="Forget",
            category="unlearning",
            description="Makes a model forget styles, objects or people by name. It goes where a LoRA loader goes: "
            "between Load Checkpoint and KSampler. Put another Forget behind it to forget more.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model from Load Checkpoint, a LoRA loader or another Forget.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to it. It is not changed."),
                io.String.Input(
                    "forget",
                    default="",
                    multiline=True,
                    placeholder="names to forget, one per line\nobject: cat -> tree",
                    tooltip="Names to forget, one per line, as in prompts. A bare name is a style. Others say "
                    "their kind and what they become: 'object: cat -> tree', 'celebrity: Jane Doe'.",
                ),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    placeholder="names to keep, one per line (may stay empty)",
                    tooltip="Names that must stay, one per line: relatives of what is forgotten that matter "
                    "most to you. Names on no list are protected too, less surely.",
                ),
                io.Combo.Input(
                    "how",
                    options=list(_PRESETS),
                    default="fast",
                    tooltip="fast: solves all names at once, in seconds, and each can be taken back. thorough: "
                    "trains name after name, for minutes, or hours on large models.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the forgetting is applied; 0 is the untouched model. Changing it "
                    "trains nothing anew. Of several Forget nodes in a row the last one's counts for all.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's VAE, for the before and after image. Drawing takes a moment.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model that forgot, for KSampler, LoRA loaders, another Forget and the save nodes. "
                    "Its history travels with it.",
                ),
                io.Clip.Output(display_name="clip", tooltip="The text encoder as it came in."),
                io.String.Output(
                    display_name="report", tooltip="What was forgotten, how, and what it cost, as text."
                ),
                io.Image.Output(
                    display_name="before_after",
                    tooltip="The first name and a neighbour that stays, before and after, with equal seeds. "
                    "Black without a VAE.",
                ),
            ],
            **search_aliases("erase", "unlearn", "remove artist", "remove style", "concept", "negative LoRA"),
        )

    @classmethod
    def validate_inputs(cls, forget="", keep=""):
        """Refuses lists that cannot work before anything of the graph runs; one that is linked is None."""
        try:
            if forget is not None:
                _parsed(forget, keep or "")
            elif keep is not None:
                parse_keep(keep)
        except ConceptError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_):
        return deleted_snapshots()

    @classmethod
    def execute(cls, model, clip, forget, keep, how, strength, vae=None):
        lists, kept = _parsed(forget, keep)
        if how not in _PRESETS:
            raise ConfigError(f"how is {how!r}; choose one of {', '.join(_PRESETS)}.")
        loaded, _ = opened(model, clip, vae)
        _require_known(loaded.value, kept)
        requests = [resolve(_PRESETS[how], loaded.value.family, targets, kept) for targets in lists]
        result, reports = forgotten(loaded, requests)
        patched, *_ = _host.native(replace(result, strength=strength))
        text = "\n\n".join(map(step_text, reports))
        if loaded.value.edits and strength != loaded.strength:
            text += f"\n\nThe strength {strength:g} counts for what was forgotten before, too."
        if vae is None:
            black = Image.new("RGB", (_NO_PICTURE_PX, _NO_PICTURE_PX))
            return io.NodeOutput(patched, clip, text, _host.to_image_tensor(black))
        image = _before_after(model, patched, clip, vae, requests[0], loaded.value.family)
        return io.NodeOutput(patched, clip, text, image, ui=ui.PreviewImage(image, cls=cls))


def _require_known(value: UnlearnModel, kept: Sequence[Concept]) -> None:
    """Check that nothing is to be kept that the model has forgotten already."""
    gone = {Concept.from_json(concept).name.lower() for concept in value.forgotten}
    if late := [concept.name for concept in kept if concept.name.lower() in gone]:
        raise ConceptError(
            f"{late[0]!r} is to be kept, and an earlier node has forgotten it; take it out of one of them."
        )


def _before_after(
    before: Any, after: Any, clip: Any, vae: Any, request: Request, family: Family
) -> torch.Tensor:
    """The host's IMAGE of the first name, and of what stays, by two MODELs with equal seeds."""
    shown = preview_prompts(request)
    shown = shown[:: max(len(shown) - 1, 1)]  # the first and the last
    sampler = PRESETS["trained"].for_family(family).anchor_sampler
    is_discrete = isinstance(family.process, DiscreteProcess)
    rows = [
        (
            label,
            list(
                _host.sample(
                    model,
                    clip,
                    vae,
                    family.image_size_px,
                    [prompt for _, prompt in shown],
                    seed=0,
                    steps=sampler.steps,
                    cfg=sampler.guidance_scale,
                    sampler="dpmpp_2m" if is_discrete else "euler",
                    scheduler="karras" if is_discrete else "simple",
                )
            ),
        )
        for label, model in (("before", before), ("after", after))
    ]
    cell = 128 if family.image_size_px <= 128 else 256
    return _host.to_image_tensor(labelled_grid("Equal seeds", [label for label, _ in shown], rows, cell))


NODES = (Forget,)
