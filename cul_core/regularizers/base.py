"""What a regularizer may do in a step. The loop asks for each hook; none is obligatory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.config import Config
from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.step_context import StepContext


class Regularizer:
    """Base of all regularizers, with hooks that do nothing.

    Before the first update: `prepare` of all, then `prepare_mask` of all. Order of the hooks within one
    update: `penalty` joins the method's loss; after its backward, `loss_terms`, whose gradients add to it;
    `transform_gradient`; clipping; the optimizer; then on the weights `proximal`; last, on the actual change
    of the weights, `mask` and `constrain`, so that these hold exactly whatever the optimizer did.
    `needs_anchor_latents` asks the loop for pictures by W0, which cost time to sample.

    All weights, gradients and changes that hooks get are fp32. From `transform_gradient` on they are on the
    device; what is kept for every weight should rest where `StepContext.start` does, which is the CPU if
    memory is short, and go there tensor by tensor.
    """

    needs_anchor_latents = False

    needs: tuple[str, ...] = ()

    def __init__(self, config: Config):
        self.config = config

    def prepare(self, context: StepContext) -> None:
        """Called once before the first update."""

    def coordinates(self, name: str) -> Tensor | None:
        """Orthonormal basis B (d, m) of the text directions in which a (out, d) matrix may change; None if
        that is not limited.

        Known once `prepare` is done. Masks of this matrix are then made for the coordinates A (out, m) of the
        change A B^T, and this regularizer's `constrain` applies them there: elementwise zeros in the matrix
        itself would leave the span of B.
        """
        return None

    def prepare_mask(self, context: StepContext, coordinates: Callable[[str], Tensor | None]) -> None:
        """Called once when every `prepare` is done; the UNet holds the step's start, with gradients as in
        training.

        `coordinates` asks all regularizers for what the hook of this name says.
        """

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Scalar to add to the loss."""
        return None

    def loss_terms(self, student: Predict, pretrained: Predict, start: Predict) -> dict[str, Tensor]:
        """Terms of the loss by name, scalars that need the model's predictions.

        `pretrained` and `start` are the teachers W0 and W_{k-1}; their calls come before those of `student`
        (weights are exchanged in place).
        """
        return {}

    def update_skipped(self, iteration: int) -> None:
        """See `Method.update_skipped`; only the hooks that make the loss were called in this update."""

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        return gradient

    def proximal(self, name: str, weight: Tensor, learning_rate: float) -> Tensor:
        """The weight after a proximal step on this regularizer's penalty."""
        return weight

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        """1 where the weight, or its change in `coordinates`, may change, 0 where not, same shape as these;
        None for no mask."""
        return None

    def constrain(self, name: str, change: Tensor, mask: Tensor | None) -> Tensor | None:
        """The allowed part of a change under the masks of all regularizers; None leaves it to the next
        regularizer."""
        return None

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """See `Method.restore`."""

    def report(self) -> dict[str, float]:
        """Figures of `prepare` worth showing, such as the rank of a protected subspace."""
        return {}


REGULARIZERS: Registry[Regularizer] = Registry("regularizer")
