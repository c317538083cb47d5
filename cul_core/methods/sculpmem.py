"""SculpMem: Concept Ablation or the authors' own loss, under a dynamic mask on every matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..base.config import setting
from ..base.errors import ConfigError
from ..base.topk import count_of_fraction, top_k
from ..concepts.concept import Concept
from ..models.sampling import Predict, sample_latents
from ..models.text_conditioning import Conditioning
from ..parts.anchor_augmentation import AnchorPool
from ..parts.part import Cost, LossTerms, Teachers, Weights
from ..parts.step_context import StepContext
from ..parts.training_config import TrainingConfig
from .base import METHODS
from .conabl import ConAbl, ConAblConfig

_EXCHANGED_UNTIL = 0.8


@dataclass(frozen=True)
class SculpMemConfig(ConAblConfig):
    """`reference` is SculpMem as the continual unlearning paper runs it; the defaults are ours.

    The authors' own settings are: loss `sm`, teacher `student`, first token not blocked, form `reference`,
    preservation 1 and distillation 1. Both weights are four times the authors' 0.25, because the forgetting
    term sums over four channels. Their released code overwrites the distillation term, as if its weight were
    0. Their one-cycle learning rate is not offered.
    """

    loss: str = setting(
        "conabl",
        "conabl: Concept Ablation's. sm: the authors' own, taken at images of the target, which the "
        "pretrained model samples before training.",
        choices=("conabl", "sm"),
    )
    warm_up: int = setting(
        50,
        "Iterations at the beginning whose gradients choose the first mask; a twentieth of all is usual.",
        minimum=1,
    )
    warm_up_form: str = setting(
        "freeze",
        "freeze: no weight changes in the warm-up. train: all weights change, without a mask, except in its "
        "last iteration.",
        choices=("freeze", "train"),
    )
    interval: int = setting(
        100,
        "Iterations between two exchanges of the mask's entries; a tenth of all is usual.",
        minimum=1,
    )
    active_fraction: float = setting(
        0.5, "Share of every matrix that may change at a time (rho).", minimum=0.001, maximum=1.0
    )
    turnover: float = setting(
        0.2,
        "Share of the active entries that the first exchanges replace; it falls along a cosine, and "
        "exchanges end at 0.8 of the training.",
        minimum=0.0,
        maximum=1.0,
    )
    importance: str = setting(
        "signed",
        "How the gradients g since the last exchange become a score. signed: abs(sum of g), where "
        "iterations cancel, as in the reference. abs: sum of abs(g). fisher: sum of g squared.",
        choices=("signed", "abs", "fisher"),
    )
    distillation: float = setting(
        0.0,
        "Weight of distillation from the step's start on anchor images, with their own prompts and with "
        "those of earlier targets.",
        minimum=0.0,
    )
    form: str = setting(
        "update",
        "update: the optimizer's change is masked too, in the subspace that a projection allows. reference: "
        "only gradients are masked, weight by weight.",
        choices=("update", "reference"),
    )
    REFERENCE: ClassVar[dict] = {**ConAblConfig.REFERENCE, "warm_up_form": "train", "form": "reference"}

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "sm" and (self.augmentations or self.flip):
            raise ConfigError(
                "Loss 'sm' takes images of the target as they are; set augmentations to 0 and flip to False."
            )


def turnover_at(turnover: float, epoch: float, epochs: float) -> float:
    """Share of the active entries replaced at `epoch` (from 0): turnover (1 + cos(pi epoch / epochs)) / 2."""
    return turnover * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def largest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask, shape of `scores`, of exactly the `count` largest magnitudes; ties go to the first."""
    return top_k({"": scores}, count).mask("", scores)


def exchanged(mask: Tensor, scores: Tensor, share: float) -> Tensor:
    """The mask with its lowest-scored active entries replaced by the highest-scored inactive ones.

    Args:
        mask: boolean, of the matrix's shape.
        scores: importance of every entry, same shape.
        share: of the active entries that are replaced, at least one; the number of active entries stays.
    """
    active = int(mask.sum())
    count = min(max(1, count_of_fraction(share, active)), active, mask.numel() - active)
    result = torch.empty_like(mask)
    for side, kept in ((mask, active - count), (~mask, count)):
        result[side] = largest(scores[side], kept)
    return result


@METHODS.register(
    "sculpmem",
    config=SculpMemConfig,
    display_name="SculpMem",
    description="Concept Ablation under a mask: a part of the weights changes at a time, chosen anew during "
    "training.",
    paper="Sculpting Memory: Multi-Concept Forgetting in Diffusion Models via Dynamic Mask and "
    "Concept-Aware Optimization, ICCV 2025, arXiv 2504.09039",
)
class SculpMem(ConAbl):
    """L = L_conabl + distillation sum_c mean (f_W(x_a, t, c) - f_start(x_a, t, c))^2, under a dynamic mask.

    L_conabl is Concept Ablation's loss; its preservation term is the authors' superclass alignment. x_a are
    noisy anchor images, start is W_{k-1}. The sum over c has the anchors' own prompts and, after earlier
    steps, one random earlier target's prompt per image. With loss `sm`, L_conabl is taken at images of the
    target by W0, and during a frozen warm-up L is the diffusion loss of those images. Anchors stand for the
    authors' images of the superclass; no negative prompt keeps the target out of them.

    The importance A_ij of a matrix entry is accumulated over the raw gradients g since the last exchange. At
    the end of the warm-up the floor(rho N) entries of highest A in each matrix become active; vectors
    (biases, norms) are never masked. `exchanged` runs after every `interval` iterations while epoch < 0.8 E;
    in an epoch as many images are trained as there are anchors. Iterations whose gradients overflow in fp16
    do not count.

    In the form `update`, the mask acts on the gradients and on the actual change, in coordinates of the
    subspace that the regularizers allow. Entries outside the mask keep their bits. When an entry leaves the
    mask, Adam's moments of the entry are set to zero: stale momentum would move it when it returns. Second
    moments cannot be expressed in a subspace's coordinates, so they stay where a subspace is limited.

    Raises:
        ConceptError: see `ConAbl`.
        ConfigError: the warm-up takes all iterations.
    """

    config: SculpMemConfig

    def cost(
        self,
        training: TrainingConfig,
        concepts: Sequence[Concept],
        previous: Sequence[Concept],
        captions: int,
    ) -> Cost:
        cost = super().cost(training, concepts, previous, captions)
        held = training.batch_size * (1 + bool(previous)) if self.config.distillation else 0
        return Cost(cost.student_images + held, cost.teacher_images + held, cost.prompts + len(previous))

    def prepare(self, context: StepContext) -> None:
        super().prepare(context)
        config, training = self.config, context.training
        if config.warm_up >= training.iterations > 0:
            raise ConfigError(
                f"A warm-up of {config.warm_up} iterations leaves none of {training.iterations} to train "
                f"with a mask; shorten it, to about {max(1, training.iterations // 20)}."
            )
        self._epoch = math.ceil(len(context.anchor_prompts) / training.batch_size)
        self._epochs = math.ceil(training.iterations / self._epoch)
        self._seen, self._masks = 0, {}
        self._previous = (
            context.network.encode([concept.prompt for concept in context.previous])
            if context.previous
            else None
        )
        if config.loss == "sm":
            self._draw_targets(context)

    def _draw_targets(self, context: StepContext) -> None:
        """Replace the anchor images by images of the targets, each sampled for one of its target prompts."""
        rows, anchor_rows = [], []
        for pairs in (*self._pairs, *self._earlier):
            for i, (image, versions) in enumerate(pairs):
                rows.append(versions[i % len(versions)])
                anchor_rows.append(self._anchor_rows[image])
                pairs[i] = (len(rows) - 1, rows[-1:])
        self._anchor_rows = anchor_rows
        generators = [context.generator("target picture", i) for i in range(len(rows))]
        latents = sample_latents(
            context.network,
            [self._prompts[row] for row in rows],
            generators,
            context.anchor_sampler,
            lambda done: context.check(),
        )
        self._pool = AnchorPool(range(len(rows)), [""] * len(rows), latents.to(context.network.device))

    def prepare_mask(self, context: StepContext, allowed_subspace: Callable[[str], Tensor | None]) -> None:
        in_update = self.config.form == "update"
        names = [name for name, weight in context.start.items() if weight.ndim > 1]
        self._bases = {
            name: basis for name in names if in_update and (basis := allowed_subspace(name)) is not None
        }
        self._scores = {
            name: torch.zeros_like(self._in_coordinates(name, context.start[name])) for name in names
        }

    def state(self) -> dict[str, Any]:
        return {"seen": self._seen, "masks": dict(self._masks), "scores": self._scores}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self._seen = state["seen"]
        self._masks, self._scores = (
            {name: tensor.to(device) for name, tensor in state[part].items()} for part in ("masks", "scores")
        )

    # --- the loss

    def loss(self, student: Predict, teachers: Teachers, generator: torch.Generator) -> LossTerms:
        config = self.config
        if config.loss == "sm" and config.warm_up_form == "freeze" and self._seen < config.warm_up:
            return self._learning(student, generator)
        if not config.distillation:
            return super().loss(student, teachers, generator)
        held = self._draw_held(generator)
        goal = teachers.start(*held)
        loss = super().loss(student, teachers, generator)
        drift = (student(*held) - goal).square().split(self._batch)
        distilled = config.distillation * sum(part.mean() for part in drift)
        return LossTerms(loss.total + distilled, {**loss.terms, "distill": distilled.item()})

    def _learning(self, student: Predict, generator: torch.Generator) -> LossTerms:
        """The diffusion loss of the target's images with the target's prompts."""
        images, targets = self._draw(generator)
        clean = self._pool.latents[images]
        noisy, timesteps, noise = self._noised(clean, generator)
        truth = self._process.target(clean, noise, timesteps)
        loss = (student(noisy, timesteps, self._embeddings[targets]) - truth).square().mean()
        return LossTerms(loss, {"learn": loss.item()})

    def _draw_held(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Conditioning]:
        """(z_t, t, conditioning) of anchors with their own prompts, then with earlier targets' if any."""
        (noisy, timesteps, anchors), _ = self._draw_anchors(generator)
        if self._previous is None:
            return noisy, timesteps, anchors
        previous = self._previous[torch.randint(len(self._previous), (self._batch,), generator=generator)]
        return noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), Conditioning.cat([anchors, previous])

    # --- the mask

    @torch.no_grad()
    def after_backward(self, iteration: int, weights: Weights, optimizer: Optimizer) -> bool:
        config, updates = self.config, self._seen
        epoch = (updates - 1) // self._epoch  # of the update before this one
        is_due = updates > config.warm_up and updates % config.interval == 0
        if is_due and epoch < _EXCHANGED_UNTIL * self._epochs:
            self._renew(weights, optimizer, turnover_at(config.turnover, epoch, self._epochs))
        part = {"signed": lambda gradient: gradient, "abs": torch.abs, "fisher": torch.square}[
            config.importance
        ]
        for name, scores in self._scores.items():
            scores += part(self._in_coordinates(name, weights[name].grad))
        self._seen = updates + 1
        if self._seen == config.warm_up:
            self._renew(weights, optimizer)
        return self._seen > config.warm_up or (self._seen < config.warm_up and config.warm_up_form == "train")

    def _renew(self, weights: Weights, optimizer: Optimizer, share: float = 0.0) -> None:
        """Make the first masks from the scores, or exchange a share of their entries; reset the scores."""
        for name, scores in self._scores.items():
            before = self._masks.get(name)
            if before is None:
                after = largest(scores, count_of_fraction(self.config.active_fraction, scores.numel()))
            else:
                after = exchanged(before, scores, share)
            self._masks[name] = after
            scores.zero_()
            if self.config.form == "update" and (moments := optimizer.state.get(weights[name])):
                left = ~after if before is None else before & ~after
                if (basis := self._bases.get(name)) is None:
                    moments["exp_avg"][left] = moments["exp_avg_sq"][left] = 0
                else:
                    leaving = (self._in_coordinates(name, moments["exp_avg"]) * left).to(
                        basis.device
                    ) @ basis.T
                    moments["exp_avg"] -= leaving.to(left.device)

    def _in_coordinates(self, name: str, matrix: Tensor) -> Tensor:
        if name not in self._bases:
            return matrix
        basis = self._bases[name]
        return (matrix.to(basis.device) @ basis).to(matrix.device)

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self._masks:
            return gradient
        masked = self._in_coordinates(name, gradient) * self._masks[name].to(gradient.device)
        return masked @ self._bases[name].T if name in self._bases else masked

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        return (
            self._masks[name].to(weight.device)
            if self.config.form == "update" and name in self._masks
            else None
        )
