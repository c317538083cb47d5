"""What a forgetting method is, and what the loop hands to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.config import Config
from ..base.registry import Registry
from ..models.sampling import Predict
from ..parts.step_context import StepContext

Weights = Mapping[str, nn.Parameter]
"""The trained weights by name, in fp32."""


@dataclass(frozen=True)
class LossParts:
    """A loss to minimize, and the named parts it is made of (for reports)."""

    total: Tensor
    parts: dict[str, float]


class Method:
    """Base of all methods. A trained one implements `loss`; a closed-form one sets `is_closed_form` and
    implements `edit`.

    The loop also asks `teacher_is_pretrained` (the teacher is W0, not the step's start), `blocks_first_token`
    (no gradient through the keys and values of the start token) and `needs_anchor_latents` (pictures by W0;
    they cost time to sample). Estimates ask for `student_calls` and `teacher_calls`, predictions of a batch
    within one loss with and without gradients.

    One that chooses which weights change has hooks as regularizers have them, which act before theirs:
    `prepare_mask`, `transform_gradient` and `mask`.
    """

    is_closed_form = False
    needs_anchor_latents = True
    teacher_is_pretrained = False
    blocks_first_token = False
    student_calls = teacher_calls = 1

    needs: tuple[str, ...] = ()

    def __init__(self, config: Config):
        self.config = config

    def prepare(self, context: StepContext) -> None:
        """Called once before the first update; encodes prompts and the like."""

    def loss(self, student: Predict, teacher: Predict, generator: torch.Generator) -> LossParts:
        """One training loss. `teacher` calls come before `student` calls (weights are exchanged in place).

        What `student` predicts is cut off from the network: the loop takes the loss's gradients by it, then
        the network's, and may split the batch for that. So everything that the loss draws at random is drawn
        here, once per update, however often the network runs.
        """
        raise NotImplementedError

    def prepare_mask(self, context: StepContext, coordinates: Callable[[str], Tensor | None]) -> None:
        """See `Regularizer.prepare_mask`."""

    def after_backward(self, iteration: int, weights: Weights, optimizer: Optimizer) -> bool:
        """Whether to apply the update; False: no weight changes this time.

        Called after the backward of every update, iterations from 1, while the gradients are as they came.
        If they overflowed, `update_skipped` is called instead. So what depends on the number of updates
        counts these calls, not iterations.

        What leaves a mask here must leave the optimizer's memory too, or it would move on from there when it
        comes back.
        """
        return True

    def update_skipped(self, iteration: int) -> None:
        """Called in place of `after_backward` when gradients overflowed in fp16; no weight changes."""

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        return gradient

    def mask(self, name: str, weight: Tensor) -> Tensor | None:
        """See `Regularizer.mask`."""
        return None

    def state(self) -> dict[str, Any]:
        """What updates have changed since everything was prepared: dicts and lists of tensors and JSON
        values, for a step that is stopped and goes on. Tensors may be its own.
        """
        return {}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Called after all preparations of a step that goes on: be as when `state` gave this; its tensors, on
        the CPU, are yours."""

    def edit(self, context: StepContext) -> dict[str, Tensor]:
        """New weights by name, for closed-form methods."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method")
