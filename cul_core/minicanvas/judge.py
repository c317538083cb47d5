"""Asks a model for pictures of MiniCanvas' styles and objects, and classifies them."""

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
from .world import OBJECTS, STYLE_BY_NAME, STYLE_LABELS


class Judge:
    """The shipped classifier: pictures (b, 3, 64, 64) in [0, 1] to verdicts."""

    def __init__(self, path: Path = models.CLASSIFIER_PATH):
        self._model = models.Classifier(len(STYLE_LABELS), len(OBJECTS))
        self._model.load_state_dict(
            {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(path).items()
            }
        )
        self._model.eval().requires_grad_(False)

    def __call__(self, pictures: Tensor) -> list[Verdict]:
        styles, objects = self._model(pictures)
        return [
            Verdict((*STYLE_LABELS, "")[s], (*OBJECTS, "")[o])
            for s, o in zip(styles.argmax(1), objects.argmax(1), strict=True)
        ]


def take(
    network: Network,
    model: UnlearnModel,
    shots: Sequence[Shot],
    seed: int,
    sampler: SamplerConfig | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1] of the shots; each depends on its own shot and the seed alone."""
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
    """Scores of `model` after `targets` of a suite were forgotten, asked across these names (all of the
    suite's if not given)."""
    shots = suite.shots(targets, per_cell, across)
    return score(shots, judge(take(network, model, shots, seed, on_batch=on_batch)), suite.domain)


_FEW = 10


def measure_for(request: Request, judge: Judge | None = None) -> Measure:
    """How early stopping measures a request of MiniCanvas: UA of its targets, RA of what it declares (of its
    suite's, if nothing).

    First by few pictures, ten of targets and ten of what is kept. Only if these show a UA of `stop_at_ua` or
    more, by all that `evaluate` asks for by these names. The seed is the request's, so that nothing but the
    request and the model matters.

    Raises:
        ConceptError: a target is not in the suite, so it would not be measured.
    """
    suite, targets = suite_of([concept.target for concept in request.concepts])
    if len(targets) < len(request.concepts):
        raise ConceptError(
            f"Of {', '.join(repr(concept.target) for concept in request.concepts)}, only {targets} can be "
            "measured; forget either styles or objects of MiniCanvas, or set evaluate_every to 0."
        )
    kept = suite_of([concept.target for concept in request.retain if concept.kind == suite.domain])[1]
    asked = replace(
        suite, declared=tuple(name for name in kept if name not in targets) or suite.declared, hidden=()
    )
    few, rest, across = [], [], len(suite.across)
    for role in ("target", "declared"):
        shots = [shot for shot in asked.shots(targets) if shot.role == role]
        # a picture of each concept in turn, each of another object (or in another style)
        picked = {i % (len(shots) // across) * across + i % across for i in range(_FEW if shots else 0)}
        few += [shots[i] for i in sorted(picked)]
        rest += [shot for i, shot in enumerate(shots) if i not in picked]
    judge = judge or Judge()

    def measure(network: Network, check: Callable[[], None]) -> tuple[float, float] | None:
        def seen(shots: list[Shot]) -> list[Verdict]:
            return (
                judge(_draw(network, shots, request.training.seed, SamplerConfig(), lambda done: check()))
                if shots
                else []
            )

        verdicts = seen(few)
        scores = score(few, verdicts, suite.domain)
        if scores.ua >= request.training.stop_at_ua:
            scores = score(few + rest, verdicts + seen(rest), suite.domain)
        return None if scores.ira_declared is None else (scores.ua, scores.ira_declared)

    return measure


class MiniCanvasClassifier(Classifier):
    """The classifier of MiniCanvas as audits ask for it; styles or objects, by what is asked about."""

    def __init__(self):
        self._judge = Judge()

    def check(self, names: Sequence[str]) -> None:
        suite, targets = suite_of(names)
        known = {target.replace("_", " ") for target in targets} | set(targets)
        if unknown := [name for name in names if name not in known]:
            choice = ", ".join(OBJECTS if suite.domain == "object" else STYLE_BY_NAME)
            raise ConceptError(
                f"MiniCanvas has no {suite.domain} {brief_repr(unknown[0])} to score; choose among "
                f"{choice}, "
                "of one kind at a time."
            )

    def count(self, names: Sequence[str], per_cell: int) -> int:
        suite, targets = suite_of(names)
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
        suite, targets = suite_of(names)
        return evaluate(
            network, model, self._judge, targets, seed=seed, suite=suite, per_cell=per_cell, on_batch=on_batch
        )

    def measure_for(self, request: Request) -> Measure:
        return measure_for(request, self._judge)
