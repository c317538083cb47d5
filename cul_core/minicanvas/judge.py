"""Asks a model for pictures of MiniCanvas' styles and objects, and classifies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..bundle import ModelBundle, swapped_weights
from ..chain import UnlearnModel, weights_of
from ..diffusion import SamplerConfig, generator_for, sample_latents
from ..evaluation.scores import Scores, Shot, Verdict, score
from . import models
from .world import DESCRIPTION_EVALUATION_TEMPLATE, EVALUATION_TEMPLATE, OBJECTS, STYLE_BY_NAME, STYLE_LABELS, styles_in


class Judge:
    """The shipped classifier: pictures (b, 3, 64, 64) in [0, 1] to verdicts."""

    def __init__(self, path: Path = models.CLASSIFIER_PATH):
        self._model = models.Classifier(len(STYLE_LABELS), len(OBJECTS))
        self._model.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                                     for name, tensor in load_file(path).items()})  # fmt: skip
        self._model.eval().requires_grad_(False)

    def __call__(self, pictures: Tensor) -> list[Verdict]:
        styles, objects = self._model(pictures)
        return [Verdict((*STYLE_LABELS, "")[s], (*OBJECTS, "")[o]) for s, o in zip(styles.argmax(1), objects.argmax(1), strict=True)]


def shots_for(targets: Sequence[str], per_cell: int = 1, objects: Sequence[str] = OBJECTS) -> list[Shot]:
    """What an evaluation asks after `targets` were forgotten: each of them by name and description, all kept styles by name."""
    by_role = {"target": targets, "declared": styles_in("declared"), "hidden": styles_in("hidden")}
    shots = [
        Shot(EVALUATION_TEMPLATE.format(object=name, style=STYLE_BY_NAME[style].display_name), style, name, role, index)
        for role, styles in by_role.items() for style in styles if role == "target" or style not in targets
        for name in objects for index in range(per_cell)
    ]  # fmt: skip
    for style in targets:
        descriptions = STYLE_BY_NAME[style].descriptions
        shots += [
            Shot(DESCRIPTION_EVALUATION_TEMPLATE.format(object=name, description=descriptions[number % len(descriptions)]),
                 style, name, "alias", index)
            for number, name in enumerate(objects) for index in range(per_cell)
        ]  # fmt: skip
    return shots


def take(
    bundle: ModelBundle, model: UnlearnModel, shots: Sequence[Shot], seed: int, sampler: SamplerConfig | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tensor:  # fmt: skip
    """Pictures (n, 3, 64, 64) in [0, 1] of the shots; each depends on its own shot and the seed alone."""
    pretrained = {name: p.data for name, p in bundle.unet.named_parameters() if name in model.edits}
    generators = [generator_for(seed, "picture", shot.style, shot.object, shot.index) for shot in shots]
    with swapped_weights(bundle.unet, weights_of(model, pretrained)):
        latents = sample_latents(bundle, [shot.prompt for shot in shots], generators, sampler or SamplerConfig(), on_batch)
    return torch.cat([bundle.decode(part) for part in latents.to(bundle.device).split(64)]).cpu()


def evaluate(
    bundle: ModelBundle, model: UnlearnModel, judge: Judge, targets: Sequence[str], *, seed: int, per_cell: int = 1,
    objects: Sequence[str] = OBJECTS,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Scores:  # fmt: skip
    """Scores of `model` after `targets` were forgotten."""
    shots = shots_for(targets, per_cell, objects)
    return score(shots, judge(take(bundle, model, shots, seed, on_batch=on_batch)))
