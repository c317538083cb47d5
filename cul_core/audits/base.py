"""Base class and registry of audits, which test a model for forgotten and retained concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from ..base.config import Config, setting
from ..base.registry import Registry
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval; None if not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    Args:
        figures: name -> value, in the unit that the audit's description names.
        verdict: one sentence for the user.
        text: the full report as text.
        images: label -> image.
    """

    figures: Mapping[str, Figure]
    verdict: str
    text: str
    images: Mapping[str, Image.Image] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditConfig(Config):
    """Settings of all audits; each audit adds its own, such as its budget."""

    seed: int = setting(0, "Everything random of the audit derives from it.", minimum=0, maximum=2**53 - 1)


class Audit:
    """Base of all audits. An audit never changes the model; if it must train, it trains a copy."""

    def __init__(self, config: AuditConfig):
        self.config = config

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> AuditReport:
        """Audit a model: the report.

        Args:
            network: the pretrained model, unchanged when this returns or raises.
            model: the edits and the history.
            concepts: concepts that should be forgotten; if empty, the targets in the model's history.
            on_progress: called with (units done, their number); may raise to stop.

        Raises:
            ModelError: the model's family lacks what the audit needs.
        """
        raise NotImplementedError


AUDITS: Registry[Audit] = Registry("audit")
