"""Base class and registry of regularizers: a part's hooks, and terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.part import Part, Teachers


class Regularizer(Part):
    """Base of all regularizers.

    `penalty` is added to the method's loss. `loss_terms` has a backward pass of its own afterwards, whose
    gradients are added.
    """

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar to add to the method's loss, or None.

        Args:
            weights: checkpoint key -> fp32 master weight; gradients flow into it.
        """
        return None

    def loss_terms(self, student: Predict, teachers: Teachers) -> dict[str, Tensor]:
        """Scalar terms of the loss by name, made of predictions by student and teachers."""
        return {}


REGULARIZERS: Registry[Regularizer] = Registry("regularizer")
