"""What an audit is: it asks a model for what should be gone and for what should be left, and never trains
it."""

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
    """A measured value with its 95 % interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        figures: name -> value, in the unit that the audit's description gives.
        verdict: one sentence for people.
        text: everything, as text.
        images: label -> image.
    """

    figures: Mapping[str, Figure]
    verdict: str
    text: str
    images: Mapping[str, Image.Image] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditConfig(Config):
    """Settings that all audits have: its budget is in those of each."""

    seed: int = setting(0, "Everything random of the audit derives from it.", minimum=0, maximum=2**53 - 1)


class Audit:
    """Base of all audits. What one must train, it trains on a copy."""

    def __init__(self, config: AuditConfig):
        self.config = config

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> AuditReport:
        """Audit a model.

        Args:
            network: the pretrained model; as it was when this returns.
            model: its edits, and what it has forgotten.
            concepts: what should be gone; if there are none, what the model's history says.
            on_progress: called with (units done, their number); may raise to stop.

        Raises:
            ModelError: the model's family lacks what the audit needs.
        """
        raise NotImplementedError


AUDITS: Registry[Audit] = Registry("audit")
