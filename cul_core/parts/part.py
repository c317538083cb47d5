"""`Part`, the base of methods and regularizers: its needs, its memory cost, and the training loop's hooks."""

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
    """The two frozen teachers: the pretrained model W0, and the step's start W_{k-1}.

    Their predictions have no gradients. Call them before the student.
    """

    pretrained: Predict
    start: Predict

    def called(self, name: str) -> Predict:
        """The teacher of a name in settings, `pretrained` or `start`."""
        return {"pretrained": self.pretrained, "start": self.start}[name]


@dataclass(frozen=True)
class Cost:
    """A part's cost in one update, for memory estimates.

    Args:
        student_images: batch entries that the student predicts, whose graphs are in memory together.
        teacher_images: batch entries that a teacher predicts.
        prompts: encoded prompts that stay on the device.
    """

    student_images: int = 0
    teacher_images: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class LossTerms:
    """A loss with its named terms.

    Args:
        total: scalar to minimize, with gradients.
        terms: name -> value of each term, for reports.
    """

    total: Tensor
    terms: Mapping[str, float]


class Part:
    """Base of methods and regularizers, with hooks that do nothing.

    `needs` lists a part's requirements: roles of weights that must be trained (`text_readers`),
    `anchor_latents` (images sampled from W0, which takes time), `autoencoder`.

    Order of the hooks. Before the first update: `prepare` of all parts, then `prepare_mask` of all parts. In
    an update: the losses (see `Method` and `Regularizer`), `after_backward`, `transform_gradient`, gradient
    clipping, the optimizer, and `proximal` on the weights. Last, `constrain`, `mask` and `subspace` act on
    the actual change of the weights, so that they hold exactly whatever the optimizer did. If gradients
    overflowed, `update_skipped` replaces all hooks after the backward pass.

    Weights, gradients and changes that hooks receive are fp32 and named by checkpoint key. From
    `transform_gradient` on they are on the device. A part should store its own tensors of every weight on the
    device of `StepContext.start` (the CPU if memory is short), and move them one at a time.

    `draws_made_up_names` says whether the part calls `Network.words`, so that its results depend on the words
    that a benchmark withholds.
    """

    needs: tuple[str, ...] = ()
    draws_made_up_names = False

    def __init__(self, config: Config):
        self.config = config

    def cost(
        self,
        training: TrainingConfig,
        concepts: Sequence[Concept],
        previous: Sequence[Concept],
        captions: int,
    ) -> Cost:
        """The part's cost in one update.

        Args:
            training: training settings of the step.
            concepts: target concepts of the step.
            previous: concepts forgotten by earlier steps.
            captions: number of distinct anchor prompts.
        """
        return Cost()

    def prepare(self, context: StepContext) -> None:
        """Called once before the first update, for example to encode prompts."""

    def prepare_mask(self, context: StepContext, allowed_subspace: Callable[[str], Tensor | None]) -> None:
        """Called once after every `prepare`; the network holds W_{k-1} with gradients enabled.

        Args:
            context: context of the step.
            allowed_subspace: checkpoint key -> orthonormal basis B (d, m) of the text directions that all
                parts together allow; None if they limit no direction. The mask of a matrix with a basis is of
                the coordinates A (out, m) of its change A B^T.
        """

    def after_backward(self, iteration: int, weights: Weights, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the update shall change weights; called after the backward pass, before clipping.

        Zero Adam's moments of entries that leave a mask here; stale momentum would move them when they
        return.

        Args:
            iteration: number of the update, from 1.
            weights: trained weights with their unclipped gradients.
            optimizer: the optimizer of the weights.
        """
        return True

    def update_skipped(self, iteration: int) -> None:
        """Called instead of `after_backward` if the gradients overflowed and the update is skipped."""

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient that the optimizer uses for a weight, before clipping; of the weight's shape."""
        return gradient

    def proximal(self, name: str, weight: Tensor, learning_rate: float) -> Tensor:
        """The weight after a proximal step on this part's penalty."""
        return weight

    @property
    def acts_on_closed_form(self) -> bool:
        """Whether the part's constraints apply to closed-form edits; if not, such methods refuse the part."""
        return False

    def constrain(self, name: str, change: Tensor) -> Tensor:
        """The allowed part of a weight's change; masks and subspaces of all parts act on it afterwards."""
        return change

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        """1 where the weight, or its coordinate in the allowed subspace, may change, else 0; or None."""
        return None

    def subspace(self, name: str) -> Subspace | None:
        """Text directions on which the matrix's change must not act; the loop joins those of all parts."""
        return None

    def state(self) -> dict[str, Any]:
        """State that updates have changed since `prepare_mask`, for a step that is stopped and resumed.

        Nested dicts and lists of tensors and JSON values; tensors need no copy.
        """
        return {}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Return to a state that `state` gave; called after `prepare_mask` of a resumed step.

        Args:
            state: the part owns its tensors, which are on the CPU.
            device: device of the updates.
        """

    def report(self) -> dict[str, float]:
        """Numbers to show to users, by name, such as the rank of a protected subspace."""
        return {}
