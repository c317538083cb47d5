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
from .suites import STYLE_SUITE, Suite
from .world import OBJECTS, STYLE_LABELS


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
    bundle: ModelBundle, model: UnlearnModel, judge: Judge, targets: Sequence[str], *, seed: int, suite: Suite = STYLE_SUITE,
    per_cell: int = 1, across: Sequence[str] | None = None, on_batch: Callable[[int], None] = lambda done: None,
) -> Scores:  # fmt: skip
    """Scores of `model` after `targets` of a suite were forgotten, asked across these names (all of the suite's if not given)."""
    shots = suite.shots(targets, per_cell, across)
    return score(shots, judge(take(bundle, model, shots, seed, on_batch=on_batch)), suite.domain)
