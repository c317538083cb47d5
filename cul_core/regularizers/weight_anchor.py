"""L1-SP and L2-SP: penalize the distance of the weights from the step's start, from W0, or from both."""

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
    "Weights to stay near: the pretrained weights (bounds the drift of a whole chain), this step's "
    "start, or both."
)
_STRENGTH_HELP = "Weight (lambda) of the penalty, a mean over all trained values. Proximal: "
_FORM_HELP = (
    "proximal: the penalty's proximal step (a shrinkage) after the optimizer's update. penalty: a term of "
    "the loss, as in the reference."
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
    """Base of both; takes its reference weights in `prepare`, so that a resumed run keeps its anchor."""

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
        """argmin_w threshold sum_a R(w - a) + |w - weight|^2 / 2, elementwise, shape of `weight`.

        The sum is over one or two anchors a; R is `_element_penalty`.
        """
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
    description="Pulls every changed weight back by a constant amount, so that only few weights change.",
    paper="Li et al., ICML 2018, arXiv 1802.01483; Continual Unlearning, ICLR 2026, arXiv 2511.07970",
)
class L1SP(_WeightAnchor):
    """R = (1/N) sum |w - w_ref|, N trained values; proximal step sign(D) max(|D| - lr lambda / N, 0).

    With both anchors, a weight between the two stays, and any other weight moves towards the nearer anchor by
    up to 2 lr lambda / N.
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
    description="Pulls changed weights back in proportion to their change, so that the drift stays small.",
    paper="Li et al., ICML 2018, arXiv 1802.01483; Continual Unlearning, ICLR 2026, arXiv 2511.07970",
)
class L2SP(_WeightAnchor):
    """R = (1/N) sum (w - w_ref)^2, N trained values; proximal step D / (1 + 2 lr lambda / N).

    With both anchors, the proximal step is that of one anchor at their mean with twice the strength.
    """

    def _element_penalty(self, difference: Tensor) -> Tensor:
        return difference.square()

    def _shrunk(self, weight: Tensor, anchors: Sequence[Tensor], threshold: float) -> Tensor:
        centre = sum(anchors[1:], start=anchors[0]) / len(anchors)
        return centre + (weight - centre) / (1 + 2 * len(anchors) * threshold)
