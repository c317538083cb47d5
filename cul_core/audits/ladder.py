"""The ladder: several audits of one model in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..base.registry import Entry
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from .base import AUDITS, Audit, AuditReport

_ORDER = ("residual", "changes", "prompt_search", "inversion", "from_image", "resurgence", "relapse")
_APART = ("classification",)
"""Audits that need a classifier, and have a node and a command of their own."""


def rungs() -> list[Entry[Audit]]:
    """The audits of the ladder in their order; those it does not know come last."""
    found = {entry.name: entry for entry in AUDITS if entry.name not in _APART}
    return [found[name] for name in dict.fromkeys([*_ORDER, *found])]


@dataclass(frozen=True)
class Rung:
    """An audit that was run: its display name, its report and its wall time in seconds."""

    name: str
    report: AuditReport
    seconds: float

    def to_json(self) -> dict[str, Any]:
        figures = {name: asdict(figure) for name, figure in self.report.figures.items()}
        return {"verdict": self.report.verdict, "figures": figures, "seconds": round(self.seconds, 1)}


def climb(
    entries: Sequence[Entry[Audit]],
    network: Network,
    model: UnlearnModel,
    concepts: Sequence[Concept],
    budget: str,
    given: Mapping[str, Any],
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Rung]:
    """Run audits one after the other.

    Args:
        entries: of the registry.
        network: the pretrained model.
        model: the edits and the history.
        concepts: as for `Audit.run`.
        budget: one of `BUDGETS`.
        given: settings by name, for every audit that has them, such as `seed`, `wordings` and `store`.
        on_progress: called with an audit's display name, units done and their number; may raise to stop.
    """
    found = []
    for entry in entries:
        own = {field.name for field in fields(entry.config)}
        config = entry.config.of(budget, **{name: value for name, value in given.items() if name in own})
        begun = time.monotonic()

        def tell(done: int, total: int, name: str = entry.display_name) -> None:
            on_progress(name, done, total)

        report = entry.cls(config).run(network, model, concepts, tell)
        found.append(Rung(entry.display_name, report, time.monotonic() - begun))
    return found


def ladder_text(found: Sequence[Rung]) -> str:
    """The verdicts, and then every report."""
    verdicts = [f"{rung.name}: {rung.report.verdict} ({rung.seconds:.0f} s)" for rung in found]
    reports = [f"\n{rung.name}\n{rung.report.text}" for rung in found]
    return "\n".join([*verdicts, *reports])
