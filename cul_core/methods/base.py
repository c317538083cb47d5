"""What a forgetting method is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.part import LossTerms, Part, Teachers
from ..parts.step_context import StepContext


class Method(Part):
    """Base of all methods. A trained one implements `loss`; a closed-form one sets `is_closed_form` and
    implements `edit`, whose result passes through the masks and constraints of all parts.

    With `blocks_first_token` no gradient reaches the text readers through the rows that all prompts share.
    """

    is_closed_form = False
    blocks_first_token = False

    def loss(self, student: Predict, teachers: Teachers, generator: torch.Generator) -> LossTerms:
        """One training loss.

        What `student` predicts is detached from the network: the loop takes the loss's gradients by it, then
        the network's, and may split the batch for that. So everything that the loss draws at random is drawn
        here, once per update, however often the network runs.
        """
        raise NotImplementedError

    def edit(self, context: StepContext) -> dict[str, Tensor]:
        """New weights by checkpoint key, for closed-form methods."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method")
