"""The common base of methods and regularizers: what a part of a step declares, and the hooks that the loop
calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.config import Config
from ..concepts.concept import Concept
from ..models.sampling import Predict
from .step_context import StepContext
from .subspace import Subspace
from .training_config import TrainingConfig

Weights = Mapping[str, nn.Parameter]
"""Checkpoint key -> fp32 parameter, of the trained weights."""


@dataclass(frozen=True)
class Teachers:
    """The two frozen models that a part may ask: W0, and W_{k-1} that the step starts from.

    Their predictions have no gradients, and come before those of the student.
    """

    pretrained: Predict
    start: Predict

    def called(self, name: str) -> Predict:
        """One of them, by the name that settings use."""
        return {"pretrained": self.pretrained, "start": self.start}[name]


@dataclass(frozen=True)
class Cost:
    """What a part takes of every update, for estimates.

    Args:
        student_images: images that are predicted with gradients, all their graphs at a time.
        teacher_images: images that a teacher predicts.
        prompts: encoded prompts that stay on the device.
    """

    student_images: int = 0
    teacher_images: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class LossTerms:
    """A loss to minimize, and the named terms it is made of, for reports."""

    total: Tensor
    terms: Mapping[str, float]


class Part:
    """Base of methods and regularizers, with hooks that do nothing.

    `needs` names what a part asks of the model and of the loop: roles of weights that must be among the
    trained ones (`text_readers`), `anchor_latents` (images by W0, which cost time to sample), `autoencoder`.

    Order of the hooks. Before the first update: `prepare` of all, then `prepare_mask` of all. In an update:
    the losses (see `Method` and `Regularizer`), `after_backward`, `transform_gradient`, clipping, the
    optimizer, then on the weights `proximal`; last, on the actual change of the weights, `constrain`, `mask`
    and `subspace`, so that these hold exactly whatever the optimizer did. `update_skipped` takes the place of
    all that follows the backward pass when gradients overflowed.

    All weights, gradients and changes that hooks get are fp32, called by checkpoint key. From
    `transform_gradient` on they are on the device; what is kept for every weight should rest where
    `StepContext.start` does, which is the CPU if memory is short, and go there tensor by tensor.
    """

    needs: tuple[str, ...] = ()

    def __init__(self, config: Config):
        self.config = config

    def cost(
        self,
        training: TrainingConfig,
        concepts: Sequence[Concept],
        previous: Sequence[Concept],
        captions: int,
    ) -> Cost:
        """What every update takes.

        Args:
            training: how the step trains.
            concepts: what it forgets.
            previous: what earlier steps forgot.
            captions: number of different anchor prompts.
        """
        return Cost()

    def prepare(self, context: StepContext) -> None:
        """Called once before the first update; encodes prompts and the like."""

    def prepare_mask(self, context: StepContext, allowed_subspace: Callable[[str], Tensor | None]) -> None:
        """Called once when every `prepare` is done; the network holds the step's start, with gradients.

        Args:
            context: of the step.
            allowed_subspace: key of a matrix -> orthonormal basis B (d, m) of the text directions in which it
                may change by what all parts protect; None if that is not limited. A mask of such a matrix is
                one of the coordinates A (out, m) of the change A B^T.
        """

    def after_backward(self, iteration: int, weights: Weights, optimizer: torch.optim.Optimizer) -> bool:
        """Called while the gradients are as they came, iterations from 1; False: no weight changes this time.

        Zero the optimizer's moments of entries that leave a mask here; stale momentum would move them when
        they return.
        """
        return True

    def update_skipped(self, iteration: int) -> None:
        """Called in the place of `after_backward` when the gradients overflowed and the update is left
        out."""

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        return gradient

    def proximal(self, name: str, weight: Tensor, learning_rate: float) -> Tensor:
        """The weight after a proximal step on this part's penalty."""
        return weight

    @property
    def acts_on_closed_form(self) -> bool:
        """Whether this part's constraints restrain an edit that no optimizer made; others are refused
        there."""
        return False

    def constrain(self, name: str, change: Tensor) -> Tensor:
        """The allowed part of a change, before masks and subspaces act on what all parts leave."""
        return change

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        """1 where the weight, or its coordinate in the allowed subspace, may change, else 0; None for no
        mask."""
        return None

    def subspace(self, name: str) -> Subspace | None:
        """Text directions that the matrix must not act on; the loop joins those of all parts exactly."""
        return None

    def state(self) -> dict[str, Any]:
        """What updates have changed since everything was prepared, for a step that is stopped and goes on:
        dicts and lists of tensors, which may be its own, and of JSON values."""
        return {}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Called after all preparations of a step that goes on: be as when `state` gave this; its tensors, on
        the CPU, are yours."""

    def report(self) -> dict[str, float]:
        """Figures worth showing, such as the rank of a protected subspace."""
        return {}
