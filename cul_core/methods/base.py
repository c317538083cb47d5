"""Base class and registry of forgetting methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.part import LossTerms, Part, Teachers
from ..parts.step_context import SolvedRequest, StepContext


class Method(Part):
    """Base of all methods: a trained method implements `loss`, a closed-form method `edit` or `solve`.

    A closed-form method also sets `is_closed_form`; the loop passes its changes through the masks and
    constraints of all parts. A closed-form method that sets `solves_chain` implements `solve`: it solves all
    requests of a chain anew from the pretrained weights, so that the chain is a set of requests. `role` names
    the weights that a method edits, if not those of the parameter group. With `blocks_first_token` no
    gradient reaches the text readers (key and value matrices) through the token rows that all prompts share.
    """

    is_closed_form = False
    solves_chain = False
    role: str | None = None
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
        """New weights by checkpoint key, for closed-form methods that act on the step's start."""
        raise NotImplementedError

    def solve(self, context: StepContext, requests: Sequence[SolvedRequest]) -> dict[str, Tensor]:
        """Changes of the pretrained weights by checkpoint key, in fp32 on the CPU, for all requests together.

        The result is a function of the set of requests: their order changes no bit.

        Args:
            context: of the step; `context.solved` is not read.
            requests: at least one.
        """
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method")
