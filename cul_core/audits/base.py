"""Base class and registry of audits, which test a model for forgotten and retained concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from PIL import Image

from ..base.config import Config, setting
from ..base.errors import ConfigError, brief_repr
from ..base.registry import Registry
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network

BUDGETS = ("quick", "standard", "thorough")
"""How long audits search."""


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
    """Settings of all audits; each audit adds its own, whose defaults are the budget `standard`."""

    OF_BUDGET: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Budget -> the settings that it changes."""

    seed: int = setting(0, "Everything random of the audit derives from it.", minimum=0, maximum=2**53 - 1)

    @classmethod
    def of(cls, budget: str, **values: Any) -> Self:
        """The settings of a budget, with some replaced.

        Raises:
            ConfigError: the budget is unknown, or a value is invalid.
        """
        if budget not in BUDGETS:
            raise ConfigError(f"The budget is {brief_repr(budget)}; choose one of {', '.join(BUDGETS)}.")
        return cls(**{**cls.OF_BUDGET.get(budget, {}), **values})


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
