"""What a regularizer is: the hooks of a part, and terms beside the method's loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.part import Part, Teachers


class Regularizer(Part):
    """Base of all regularizers. `penalty` joins the method's loss; after its backward pass come `loss_terms`,
    whose gradients add to it."""

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Scalar to add to the loss, of the fp32 weights by checkpoint key."""
        return None

    def loss_terms(self, student: Predict, teachers: Teachers) -> dict[str, Tensor]:
        """Terms of the loss by name, scalars that need the model's predictions."""
        return {}


REGULARIZERS: Registry[Regularizer] = Registry("regularizer")
