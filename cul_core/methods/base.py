"""Base class and registry of forgetting methods."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.part import LossTerms, Part, Teachers
from ..parts.step_context import StepContext


class Method(Part):
    """Base of all methods: a trained method implements `loss`, a closed-form method `edit`.

    A closed-form method also sets `is_closed_form`; the loop passes its weights through the masks and
    constraints of all parts. With `blocks_first_token` no gradient reaches the text readers (key and value
    matrices) through the token rows that all prompts share.
    """

    is_closed_form = False
    blocks_first_token = False

    def loss(self, student: Predict, teachers: Teachers, generator: torch.Generator) -> LossTerms:
        """The loss of one update, with its named terms.

        Predictions of `student` are detached leaves. The loop computes dL/dprediction, then backpropagates it
        through the network, in micro-batches if memory is short (gradient caching). The network may thus run
        several times per update; this function runs once, so it draws all random numbers here.

        Args:
            student: predicts with the weights in training.
            teachers: the frozen models W0 and W_{k-1}.
            generator: source of the random numbers, on the CPU.
        """
        raise NotImplementedError

    def edit(self, context: StepContext) -> dict[str, Tensor]:
        """New weights by checkpoint key, for closed-form methods."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method")
