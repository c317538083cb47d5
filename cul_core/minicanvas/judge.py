"""Samples images of MiniCanvas' styles and objects, and classifies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..audits.classification import Classifier
from ..audits.classifier_scores import Scores, Shot, Verdict, score
from ..base.errors import ConceptError, brief_repr
from ..history.unlearn_model import UnlearnModel, weights_of
from ..models.network import Network
from ..models.sampling import SamplerConfig, generator_for, sample_latents
from ..requests.request import Request
from ..training.early_stopping import Measure
from . import models
from .suites import STYLE_SUITE, Suite, suite_of
from .world import SMALL, World


class Judge:
    """The shipped classifier of a world: one `Verdict` for each image of (b, 3, 64, 64) in [0, 1].

    Two objects side by side are one label, such as "star and cat".

    Args:
        path: its weights; the shipped ones if None.
        world: what the images show.
    """

    def __init__(self, path: Path | None = None, world: World = SMALL):
        self._styles, self._objects = (*world.style_labels, ""), (*world.subjects, "")
        self._model = models.Classifier(len(world.style_labels), len(world.subjects), world.pairs)
        self._model.load_state_dict(
            {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(path or models.classifier_path(world.name)).items()
            }
        )
        self._model.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> list[Verdict]:
        styles, *subjects = (logits.argmax(1).tolist() for logits in self._model(images))
        return [
            Verdict(self._styles[style], " and ".join(filter(None, (self._objects[i] for i in seen))))
            for style, *seen in zip(styles, *subjects, strict=True)
        ]


def take(
    network: Network,
    model: UnlearnModel,
    shots: Sequence[Shot],
    seed: int,
    sampler: SamplerConfig | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Images (n, 3, 64, 64) in [0, 1], one per shot; each depends on its own shot and the seed alone."""
    with network.with_weights(weights_of(model, network.exact(list(model.edits)))):
        return _draw(network, shots, seed, sampler or SamplerConfig(), on_batch)


def _draw(
    network: Network,
    shots: Sequence[Shot],
    seed: int,
    sampler: SamplerConfig,
    on_batch: Callable[[int], None],
) -> Tensor:
    generators = [generator_for(seed, "picture", shot.style, shot.object, shot.index) for shot in shots]
    latents = sample_latents(network, [shot.prompt for shot in shots], generators, sampler, on_batch)
    return torch.cat([network.decode(part) for part in latents.to(network.device).split(64)]).cpu()


def evaluate(
    network: Network,
    model: UnlearnModel,
    judge: Judge,
    targets: Sequence[str],
    *,
    seed: int,
    suite: Suite = STYLE_SUITE,
    per_cell: int = 1,
    across: Sequence[str] | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Scores of `model` after `targets` of a suite were forgotten.

    Args:
        network: the pretrained network.
        model: its edits.
        judge: the classifier.
        targets: names that the model has forgotten.
        seed: of the images.
        suite: what is asked beside the targets.
        per_cell: images per style and object.
        across: names of the cross domain to ask in; all of the suite's if not given.
        on_batch: called with the number of images done.
    """
    shots = suite.shots(targets, per_cell, across)
    return score(shots, judge(take(network, model, shots, seed, on_batch=on_batch)), suite.domain)


def still_shown(
    network: Network,
    model: UnlearnModel,
    judge: Judge,
    target: str,
    *,
    seed: int,
    suite: Suite = STYLE_SUITE,
    per_cell: int = 1,
) -> dict[str, list[bool]]:
    """Name of the cross domain -> whether each of its images, those of `evaluate`, still shows `target`."""
    shots = [shot for shot in suite.shots([target], per_cell) if shot.role == "target"]
    other = "object" if suite.domain == "style" else "style"
    shown: dict[str, list[bool]] = {}
    for shot, verdict in zip(shots, judge(take(network, model, shots, seed)), strict=True):
        shown.setdefault(getattr(shot, other), []).append(getattr(verdict, suite.domain) == target)
    return shown


_FEW = 10
"""Images of each role in the first, cheap measurement of early stopping."""


def measure_for(request: Request, judge: Judge | None = None, world: World = SMALL) -> Measure:
    """The measurement for early stopping: (UA of the request's targets, RA of its retained concepts).

    RA is that of the suite's declared concepts if the request declares none. A measurement first samples ten
    images of targets and ten of retained concepts. If their UA reaches `stop_at_ua`, it samples all images
    that `evaluate` samples of these names. The request's seed is used, so the figures depend on the request
    and the model alone.

    Raises:
        ConceptError: a target is not in the suite and cannot be measured.
    """
    suite, targets = suite_of([concept.target for concept in request.concepts], world)
    if len(targets) < len(request.concepts):
        raise ConceptError(
            f"Of {', '.join(repr(concept.target) for concept in request.concepts)}, only {targets} can be "
            "measured together; forget only styles or only objects of MiniCanvas, or set evaluate_every to 0."
        )
    kind = suite.kind or suite.domain
    kept = suite_of([concept.target for concept in request.retain if concept.kind == kind], world)[1]
    asked = replace(
        suite, declared=tuple(name for name in kept if name not in targets) or suite.declared, hidden=()
    )
    few, rest, across = [], [], len(suite.across)
    for role in ("target", "declared"):
        shots = [shot for shot in asked.shots(targets) if shot.role == role]
        # one image of each concept in turn, with the next object (or style) each time
        picked = {i % (len(shots) // across) * across + i % across for i in range(_FEW if shots else 0)}
        few += [shots[i] for i in sorted(picked)]
        rest += [shot for i, shot in enumerate(shots) if i not in picked]
    judge = judge or Judge(world=world)

    def measure(network: Network, check: Callable[[], None]) -> tuple[float, float] | None:
        def classified(shots: list[Shot]) -> list[Verdict]:
            return (
                judge(_draw(network, shots, request.training.seed, SamplerConfig(), lambda done: check()))
                if shots
                else []
            )

        verdicts = classified(few)
        scores = score(few, verdicts, suite.domain)
        if scores.ua >= request.training.stop_at_ua:
            scores = score(few + rest, verdicts + classified(rest), suite.domain)
        return None if scores.ira_declared is None else (scores.ua, scores.ira_declared)

    return measure


class MiniCanvasClassifier(Classifier):
    """MiniCanvas' classifier behind the interface of audits; the names decide between styles and objects."""

    def __init__(self, world: World = SMALL):
        self._world, self._judge = world, Judge(world=world)

    def check(self, names: Sequence[str]) -> None:
        suite, targets = suite_of(names, self._world)
        known = {target.replace("_", " ") for target in targets} | set(targets)
        if unknown := [name for name in names if name not in known]:
            choice = ", ".join(
                self._world.subjects if suite.domain == "object" else self._world.style_by_name
            )
            raise ConceptError(
                f"MiniCanvas has no {suite.domain} {brief_repr(unknown[0])}; name styles only or objects "
                f"only, among {choice}."
            )

    def names(self, kind: str) -> tuple[str, ...]:
        if kind == "style":
            return tuple(self._world.style_by_name)
        return self._world.objects if kind == "object" else self._world.people_labels

    def count(self, names: Sequence[str], per_cell: int) -> int:
        suite, targets = suite_of(names, self._world)
        return len(suite.shots(targets, per_cell))

    def evaluate(
        self,
        network: Network,
        model: UnlearnModel,
        names: Sequence[str],
        *,
        seed: int,
        per_cell: int = 1,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        suite, targets = suite_of(names, self._world)
        return evaluate(
            network, model, self._judge, targets, seed=seed, suite=suite, per_cell=per_cell, on_batch=on_batch
        )

    def measure_for(self, request: Request) -> Measure:
        return measure_for(request, self._judge, self._world)
