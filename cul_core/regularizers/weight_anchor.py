"""L1-SP and L2-SP: keep the weights near where they began, or near the pretrained ones, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..parts.step_context import StepContext
from .base import REGULARIZERS, Regularizer

_ANCHORS = ("start", "pretrained", "both")
_ANCHOR_HELP = (
    "Weights to stay near: the pretrained ones (bounds the drift of a whole chain), this step's "
    "start, or both."
)
_STRENGTH_HELP = (
    "Weight of the penalty (lambda); what it does per update is divided by the number of "
    "trained values. Proximal: "
)
_FORM_HELP = (
    "proximal: an exact shrinkage after the optimizer's update. penalty: a term of the loss, as "
    "in the reference."
)


@dataclass(frozen=True)
class L1SPConfig(Config):
    strength: float = setting(
        1e4, _STRENGTH_HELP + "1e4 is gentle on MiniCanvas, 6e4 stops forgetting.", minimum=0.0
    )
    anchor: str = setting("pretrained", _ANCHOR_HELP, choices=_ANCHORS)
    form: str = setting("proximal", _FORM_HELP, choices=("proximal", "penalty"))


@dataclass(frozen=True)
class L2SPConfig(Config):
    strength: float = setting(
        5e4, _STRENGTH_HELP + "5e4 is gentle on MiniCanvas, 5e5 stops forgetting.", minimum=0.0
    )
    anchor: str = setting("pretrained", _ANCHOR_HELP, choices=_ANCHORS)
    form: str = setting("proximal", _FORM_HELP, choices=("proximal", "penalty"))

    @property
    def results_version(self) -> int:
        """The proximal step shrank half as much in version 1."""
        return 2 if self.form == "proximal" else 1


class _WeightAnchor(Regularizer):
    """Captures its reference weights in `prepare`, never later, so that a resumed run keeps its anchor."""

    config: L1SPConfig | L2SPConfig

    def prepare(self, context: StepContext) -> None:
        anchors = {
            "start": [context.start],
            "pretrained": [context.pretrained],
            "both": [context.start, context.pretrained],
        }
        self._references = anchors[self.config.anchor]
        self._count = sum(w.numel() for w in context.start.values())

    def _element_penalty(self, difference: Tensor) -> Tensor:
        raise NotImplementedError

    def _shrunk(self, weight: Tensor, anchors: Sequence[Tensor], threshold: float) -> Tensor:
        """argmin_w threshold sum_a R(w - a) + |w - weight|^2 / 2 over one or two anchors a, elementwise; R is
        the element's penalty."""
        raise NotImplementedError

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        if self.config.form != "penalty":
            return None
        total = sum(
            self._element_penalty(weights[name].float() - reference[name]).sum()
            for reference in self._references
            for name in reference
        )
        return self.config.strength * total / self._count

    def proximal(self, name: str, weight: Tensor, learning_rate: float) -> Tensor:
        if self.config.form != "proximal":
            return weight
        threshold = learning_rate * self.config.strength / self._count
        return self._shrunk(
            weight, [reference[name].to(weight.device) for reference in self._references], threshold
        )


@REGULARIZERS.register(
    "l1sp",
    config=L1SPConfig,
    display_name="L1-SP",
    description="Pulls every changed weight back by a constant amount, so that few weights stay changed.",
    paper="Li et al., ICML 2018, arXiv 1802.01483; Continual Unlearning, ICLR 2026, arXiv 2511.07970",
)
class L1SP(_WeightAnchor):
    """R = (1/N) sum |w - w_ref|; proximal step sign(D) max(|D| - lr lambda / N, 0), N the number of trained
    elements.

    With both anchors, weights between the two stay, and the others move towards the nearer one by up to 2 lr
    lambda / N.
    """

    def _element_penalty(self, difference: Tensor) -> Tensor:
        return difference.abs()

    def _shrunk(self, weight: Tensor, anchors: Sequence[Tensor], threshold: float) -> Tensor:
        low, high = reduce(torch.minimum, anchors), reduce(torch.maximum, anchors)
        nearest = torch.clamp(weight, low, high)  # between two anchors the penalty is flat
        return nearest + torch.nn.functional.softshrink(weight - nearest, len(anchors) * threshold)


@REGULARIZERS.register(
    "l2sp",
    config=L2SPConfig,
    display_name="L2-SP",
    description="Pulls changed weights back in proportion to their change, so that the whole drift stays "
    "small.",
    paper="Li et al., ICML 2018, arXiv 1802.01483; Continual Unlearning, ICLR 2026, arXiv 2511.07970",
)
class L2SP(_WeightAnchor):
    """R = (1/N) sum (w - w_ref)^2; proximal step D / (1 + 2 lr lambda / N), N the number of trained elements.

    Both anchors act as one at their mean, twice as strong.
    """

    def _element_penalty(self, difference: Tensor) -> Tensor:
        return difference.square()

    def _shrunk(self, weight: Tensor, anchors: Sequence[Tensor], threshold: float) -> Tensor:
        centre = sum(anchors[1:], start=anchors[0]) / len(anchors)
        return centre + (weight - centre) / (1 + 2 * len(anchors) * threshold)
