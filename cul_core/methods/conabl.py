"""Concept Ablation: match the prediction for the target prompt to the one for the anchor prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..base.errors import ConceptError
from ..concepts.concept import Concept
from ..models.sampling import Predict
from ..models.text_conditioning import Conditioning
from ..parts.anchor_augmentation import anchor_pool
from ..parts.part import Cost, LossTerms, Teachers
from ..parts.step_context import StepContext
from ..parts.training_config import TrainingConfig
from .base import METHODS, Method


@dataclass(frozen=True)
class ConAblConfig(Config):
    """`reference` is what the authors' code does; the defaults are ours.

    The scripts of arXiv 2511.07970 also mirror half of the images. `reference` leaves `flip` off, because it
    needs an autoencoder.
    """

    teacher: str = setting(
        "start",
        "Model whose prediction for the anchor prompt is matched: the step's start, the pretrained model, "
        "or the student itself as in the reference.",
        choices=("start", "pretrained", "student"),
    )
    block_first_token: bool = setting(
        True, "Stop gradients through the keys and values of the start token, which all prompts share."
    )
    preservation: float = setting(
        0.0,
        "Weight of a second loss, the diffusion loss of the anchor images with their own prompts; 0 turns "
        "it off. The references double the learning rate with it.",
        minimum=0.0,
        added_later=True,
    )
    border_mask: bool = setting(
        False,
        "Leave the border of the images out of the loss, one latent pixel of 64 on every side, as in the "
        "reference. MiniCanvas images have 8 latent pixels a side, so nothing is left out of them.",
        added_later=True,
    )
    augmentations: int = setting(
        0,
        "Scaled and shifted copies of every anchor image to train on instead of the image, with prompts "
        "that say the scale ('A far away'). 0: the image itself.",
        minimum=0,
        maximum=100,
        added_later=True,
    )
    flip: bool = setting(False, "Mirror half of the anchor images.", added_later=True)
    replay: float = setting(
        0.0,
        "Share of every batch that trains targets of earlier steps again, so that they stay forgotten.",
        minimum=0.0,
        maximum=0.9,
        added_later=True,
    )
    REFERENCE: ClassVar[dict] = {"teacher": "student", "border_mask": True}


def masked_error(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Masked squared error: mean_b of sum_{c,y,x} m e^2 / sum_{y,x} m, a scalar.

    Args:
        error: e (b, c, h, w).
        mask: m (b, h, w) of 0 and 1; None is all 1.
    """
    squares = error.square().sum(1)
    return squares.mean() if mask is None else ((squares * mask).sum((1, 2)) / mask.sum((1, 2))).mean()


@METHODS.register(
    "conabl",
    config=ConAblConfig,
    display_name="Concept Ablation",
    description="Teaches the model to draw the anchor when asked for the target.",
    paper="Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516",
)
class ConAbl(Method):
    """Concept Ablation's loss (Kumari et al., eq. 3), with an optional preservation term:

        L = mean_b sum_{c,y,x} m (f_W(z_t, t, E(p*)) - sg[f_T(z_t, t, E(p))])^2 / sum_{y,x} m
            + w_pres mean (f_W(z'_t', t', E(p')) - eps')^2

    z is an anchor latent, p its prompt, p* the prompt rewritten for the target, T the teacher. Channels are
    summed, not averaged, as in the reference: its penalty weights are calibrated to the sum. The mask m
    leaves out the padding of scaled images. In the preservation term, (z', p') are anchors without
    augmentation; eps' is the velocity for a model that predicts velocities. Each target of a request is drawn
    equally often, whatever the number of its anchors. With `replay`, a share of the batch applies the first
    term to targets of earlier steps, because later steps would otherwise change their predictions again.

    Raises:
        ConceptError: no anchor prompt can be rewritten for one of the targets.
        ModelError: images are to be scaled or mirrored, and the family has no autoencoder.
    """

    config: ConAblConfig
    needs = ("text_readers", "anchor_latents")

    def __init__(self, config: ConAblConfig):
        super().__init__(config)
        self.blocks_first_token = config.block_first_token
        if config.augmentations or config.flip:
            self.needs = (*self.needs, "autoencoder")

    def cost(
        self,
        training: TrainingConfig,
        concepts: Sequence[Concept],
        previous: Sequence[Concept],
        captions: int,
    ) -> Cost:
        forms = 3 if self.config.augmentations else 1  # prompts with either scale prefix, or none
        rewritten = [*concepts, *(previous if self.config.replay else ())]
        targets = sum(2 if concept.kind == "style" else 1 for concept in rewritten)
        student = training.batch_size * (1 + bool(self.config.preservation))
        return Cost(student, training.batch_size, captions * forms * (1 + targets))

    def prepare(self, context: StepContext) -> None:
        network, config, captions = context.network, self.config, context.anchor_prompts
        self._process, self._latents = network.process, context.anchor_latents
        self._batch = context.training.batch_size
        named = (*context.concepts, *context.previous)
        usable = [
            i for i, caption in enumerate(captions) if not any(other.mentioned_in(caption) for other in named)
        ]
        rewritten = []
        for concept in context.concepts:
            rewritten.append({i: prompts for i in usable if (prompts := concept.target_prompts(captions[i]))})
            if not rewritten[-1]:
                raise ConceptError(
                    f"No anchor prompt can be turned into one for {concept.target!r}; add prompts that name "
                    f"its anchor ({concept.anchor or 'any caption without a style'!r}) and not the target."
                )
        self._pool = pool = anchor_pool(
            network,
            context.anchor_latents,
            versions=config.augmentations,
            flip=config.flip,
            border=config.border_mask,
            generator=context.generator,
            check=context.check,
        )
        rows: dict[str, int] = {}

        def row(prompt: str) -> int:
            return rows.setdefault(prompt, len(rows))

        pool_entries = [*enumerate(zip(pool.anchors, pool.prefixes, strict=True))]
        self._anchor_rows = [row(prefix + captions[i]) for _, (i, prefix) in pool_entries]

        def pairs(prompts: dict[int, tuple[str, ...]]) -> list[tuple[int, list[int]]]:
            return [
                (image, [row(prefix + prompt) for prompt in prompts[i]])
                for image, (i, prefix) in pool_entries
                if i in prompts
            ]

        self._pairs = [pairs(prompts) for prompts in rewritten]
        earlier = context.previous if config.replay else ()
        earlier_prompts = [
            {i: prompts for i in usable if (prompts := concept.target_prompts(captions[i]))}
            for concept in earlier
        ]
        self._earlier = [pairs(prompts) for prompts in earlier_prompts if prompts]
        self._preserved = [(i, row(captions[i])) for i in usable]
        self._prompts = list(rows)
        self._embeddings = network.encode(self._prompts)

    def loss(self, student: Predict, teachers: Teachers, generator: torch.Generator) -> LossTerms:
        images, targets = self._draw(generator)
        noisy, timesteps, _ = self._noised(self._pool.latents[images], generator)
        anchors = self._embeddings[[self._anchor_rows[image] for image in images]]
        with torch.no_grad():
            teacher = self.config.teacher
            goal = (student if teacher == "student" else teachers.called(teacher))(noisy, timesteps, anchors)
        predicted = student(noisy, timesteps, self._embeddings[targets])
        loss = masked_error(predicted - goal, None if self._pool.masks is None else self._pool.masks[images])
        terms = {"unlearn": loss.item()}
        if self.config.preservation:
            preservation = self.config.preservation * self._preservation(student, generator)
            loss, terms = loss + preservation, {**terms, "preserve": preservation.item()}
        return LossTerms(loss, terms)

    def _draw(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """(indices into the image pool, indices of the target prompts) of one batch."""
        replayed = min(round(self.config.replay * self._batch), self._batch - 1) if self._earlier else 0
        images, targets = [], []
        for groups, count in ((self._pairs, self._batch - replayed), (self._earlier, replayed)):
            most = max(map(len, groups), default=0)
            for number in (
                torch.randint(len(groups) * most, (count,), generator=generator).tolist() if count else ()
            ):
                pairs, i = groups[number // most], number % most
                # a target with fewer anchors than `most`: draw again, uniformly among its own
                if i >= len(pairs):
                    i = int(torch.randint(len(pairs), (), generator=generator))
                image, versions = pairs[i]
                images.append(image)
                targets.append(versions[int(torch.randint(len(versions), (), generator=generator))])
        return images, targets

    def _noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(z_t, t, eps) of latents (b, c, h, w)."""
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        times = self._process.draw_times(len(clean), generator).to(clean.device)
        return self._process.noised(clean, noise, times), times, noise

    def _draw_anchors(self, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor, Conditioning], Tensor]:
        """((z_t, t, E(p)), training target) of a batch of anchors without augmentation."""
        drawn = torch.randint(len(self._preserved), (self._batch,), generator=generator).tolist()
        anchors, prompts = zip(*(self._preserved[i] for i in drawn), strict=True)
        clean = self._latents[list(anchors)]
        noisy, timesteps, noise = self._noised(clean, generator)
        truth = self._process.target(clean, noise, timesteps)
        return (noisy, timesteps, self._embeddings[list(prompts)]), truth

    def _preservation(self, student: Predict, generator: torch.Generator) -> Tensor:
        """The student's own diffusion loss (scalar) on anchors with their own prompts."""
        inputs, truth = self._draw_anchors(generator)
        return (student(*inputs) - truth).square().mean()
