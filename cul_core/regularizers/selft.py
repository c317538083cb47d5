"""SelFT: train only the weights with the highest importance for the target; all others keep their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting, stable_hash
from ..base.errors import ConfigError, TrainingError
from ..base.topk import count_of_fraction, top_k
from ..concepts.concept import Concept, display_name
from ..models.sampling import combine, predict_guided
from ..parts.step_context import StepContext
from .base import REGULARIZERS, Regularizer


@dataclass(frozen=True)
class SelFTConfig(Config):
    """`reference` is what the authors' code does; the defaults are ours."""

    kept_fraction: float = setting(
        0.05,
        "Share of the trained weights that may change (tau); the others stay exactly as they are.",
        minimum=1e-6,
        maximum=1.0,
    )
    importance: str = setting(
        "abs",
        "How weight w and its gradients g at the visited states become a score. abs: sum of abs(w g). "
        "signed: abs(w sum of g), where states cancel, as in the reference. fisher: sum of (w g) squared.",
        choices=("abs", "signed", "fisher"),
    )
    states: int = setting(
        50,
        "States of a sampling trajectory at which gradients are taken (DDIM steps).",
        minimum=1,
        maximum=1000,
    )
    seeds: int = setting(1, "Sampling trajectories per target.", minimum=1, maximum=1000)
    guidance_scale: float = setting(
        3.0, "Classifier-free guidance of the trajectories; 1 is none.", minimum=1.0
    )
    trajectories: str = setting(
        "one",
        "one: all states of one trajectory. per_state: every state from new noise, as in the reference, "
        "which takes (states - 1) / 2 times as many sampling steps.",
        choices=("one", "per_state"),
    )
    form: str = setting(
        "update",
        "update: the optimizer's change is masked too, in the subspace that a projection allows. reference: "
        "only gradients are masked, weight by weight.",
        choices=("update", "reference"),
    )
    REFERENCE: ClassVar[dict] = {"importance": "signed", "trajectories": "per_state", "form": "reference"}


def scoring_texts(concept: Concept) -> tuple[str, str]:
    """(target, anchor) prompts of the scoring loss: (`{T} Style`, "") for a style, else the bare names."""
    return (
        (f"{concept.name} Style", "")
        if concept.kind == "style"
        else (concept.name, display_name(concept.anchor))
    )


def importance_scores(
    weights: Mapping[str, Tensor], gradients: Iterable[Sequence[Tensor]], importance: str
) -> dict[str, Tensor]:
    """Importance score >= 0 of every weight, by name, in the weights' shapes.

    Args:
        weights: name -> w.
        gradients: for every visited state k, the gradients g_k in the order of `weights`; read one by one.
        importance: `abs` is sum_k |w g_k|, `signed` |w sum_k g_k|, `fisher` sum_k (w g_k)^2.
    """
    part = {"abs": torch.abs, "signed": lambda gradient: gradient, "fisher": torch.square}[importance]
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for state in gradients:
        for total, gradient in zip(sums.values(), state, strict=True):
            total += part(gradient)
    factor = torch.square if importance == "fisher" else torch.abs
    return {name: factor(weight) * sums[name].abs() for name, weight in weights.items()}


def top_masks(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Boolean masks, in the scores' shapes, of exactly the `count` largest of all scores together.

    Scores are >= 0; ties go to the first.

    Raises:
        TrainingError: a score is NaN or infinite.
    """
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise TrainingError(
                f"The importance of {name!r} for the target is not finite; the model's weights are damaged, "
                "start from another checkpoint."
            )
    cut = top_k(scores, count, order=list(scores))
    return {name: cut.mask(name, score) for name, score in scores.items()}


@REGULARIZERS.register(
    "selft",
    config=SelFTConfig,
    display_name="SelFT",
    description="Trains only the weights that matter most for the target; all others stay exactly as they "
    "are.",
    paper="Continual Unlearning for Text-to-Image Diffusion Models: A Regularization Perspective, ICLR "
    "2026, arXiv 2511.07970",
)
class SelFT(Regularizer):
    """Mask of the floor(tau N) weights with the highest score; N counts the trained values of all tensors.

    The score of weight w is sum_k |w g_k| (see `importance_scores`). g_k is the gradient of Concept
    Ablation's loss |f_W(z_k, t_k, E(target)) - sg[f_W(z_k, t_k, E(anchor))]|^2 at state z_k of a DDIM
    trajectory for the target with guidance. Each concept and seed has one trajectory of T states, with two
    network calls per state: O(T). The reference's `per_state` samples every state from new noise: O(T^2).
    Scores are cached by a hash of their inputs, so another tau needs no new scoring.

    In the form `update`, the mask acts on the gradients, which keeps Adam's moments clean, and on the actual
    change, which is therefore zero outside the mask whatever the optimizer or its weight decay does. If
    another regularizer limits a matrix to a subspace with basis B, w and g_k are W B and G_k B, and the mask
    acts on the coordinates: zeros in D B, none in D. In the form `reference`, only gradients are masked,
    weight by weight; a part that acts later may fill the zeros.

    Raises:
        ConfigError: the fraction keeps no weight at all.
        TrainingError: scores are not finite.
    """

    config: SelFTConfig

    def prepare(self, context: StepContext) -> None:
        self._report: dict[str, float] = {}

    def prepare_mask(self, context: StepContext, allowed_subspace: Callable[[str], Tensor | None]) -> None:
        in_update = self.config.form == "update"
        self._bases = {
            name: basis
            for name in context.start
            if in_update and (basis := allowed_subspace(name)) is not None
        }
        scores = context.last_result.of(self._key(context), lambda: self._scores(context))
        total = sum(score.numel() for score in scores.values())
        count = count_of_fraction(self.config.kept_fraction, total)
        if not count:
            raise ConfigError(
                f"A kept fraction of {self.config.kept_fraction:g} lets none of {total} weights change; "
                f"raise it to {1 / total:.1g} or more."
            )
        masks = top_masks(scores, count)
        self._masks = {name: mask.to(context.start[name].device) for name, mask in masks.items()}
        chosen, whole = (
            sum(part.double().sum().item() for part in parts)
            for parts in ((scores[name][masks[name]] for name in scores), scores.values())
        )
        self._report = {
            "changeable_weights": float(count),
            "changeable_importance": chosen / whole if whole else 0.0,
        }

    def _key(self, context: StepContext) -> str:
        """Hash of everything that the scores depend on; the kept fraction is not among it."""
        digest = hashlib.sha256()
        for name, basis in self._bases.items():
            digest.update(name.encode())
            digest.update(basis.cpu().numpy().tobytes())
        settings = self.config.to_json() | {"kept_fraction": None, "form": None}
        return stable_hash(
            [
                context.origin,
                sorted(context.start),
                [scoring_texts(concept) for concept in context.concepts],
                settings,
                context.training.seed,
                str(context.network.device),
                digest.hexdigest(),
            ]
        )

    def _in_coordinates(self, name: str, matrix: Tensor) -> Tensor:
        if name not in self._bases:
            return matrix
        basis = self._bases[name]
        return (matrix.to(basis.device) @ basis).to(matrix.device)

    def _scores(self, context: StepContext) -> dict[str, Tensor]:
        """Scores by name, fp32 on the CPU: of every trained weight, or of every coordinate W B."""
        everything = context.network.weights("all")
        parameters = {name: weight for name, weight in everything.items() if name in context.start}
        weights = {name: self._in_coordinates(name, context.start[name]) for name in parameters}
        gradients = (
            [
                self._in_coordinates(name, gradient.to(weights[name]))
                for name, gradient in zip(parameters, state, strict=True)
            ]
            for state in self._gradients(context, list(parameters.values()))
        )
        return {
            name: score.cpu()
            for name, score in importance_scores(weights, gradients, self.config.importance).items()
        }

    def _gradients(self, context: StepContext, parameters: list[Tensor]) -> Iterator[Sequence[Tensor]]:
        """For every visited state, the loss's gradients in the order of `parameters`."""
        network, guidance = context.network, self.config.guidance_scale
        solver, device = network.process.trajectory(self.config.states, "leading"), network.device

        def noise(generator: torch.Generator) -> Tensor:
            return torch.randn(1, *network.family.latent_shape, generator=generator).to(device)

        for number, concept in enumerate(context.concepts):
            target_text, anchor_text = scoring_texts(concept)
            target = network.encode([target_text])
            others = network.encode(["", anchor_text] if anchor_text else [""])
            for seed in range(self.config.seeds):
                generator = context.generator(f"selft/{number}/{seed}")
                latents = noise(generator)
                for k, time in enumerate(solver.times):
                    context.check()
                    if k and self.config.trajectories == "per_state":
                        latents = noise(generator)
                        for earlier in solver.times[:k]:
                            context.check()
                            with torch.no_grad():
                                predicted = predict_guided(
                                    network.predict, latents, earlier, target, others[:1], guidance
                                )
                            latents = solver.step(predicted, earlier, latents)
                    with torch.no_grad():
                        # the empty prompt and the anchor prompt; for a style these are the same
                        several = latents.expand(len(others), -1, -1, -1)
                        known = network.predict(several, time.to(device), others)
                    predicted = network.predict(latents, time.to(device), target)
                    loss = (predicted - known[-1:]).square().sum()
                    yield torch.autograd.grad(loss, parameters, materialize_grads=True)
                    guided = combine(known[:1], predicted.detach(), guidance)
                    latents = solver.step(guided, time, latents)

    def _masked(self, name: str, matrix: Tensor) -> Tensor:
        mask = self._masks[name].to(matrix.device)
        if name not in self._bases:
            return matrix * mask
        basis = self._bases[name]
        return ((matrix @ basis) * mask) @ basis.T

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        return self._masked(name, gradient)

    @property
    def acts_on_closed_form(self) -> bool:
        return self.config.form == "update"

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        return self._masks[name].to(weight.device) if self.config.form == "update" else None

    def report(self) -> dict[str, float]:
        return self._report
