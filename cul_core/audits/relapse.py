"""Relapse: whether what early requests forgot comes back with later ones, told from the step store alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..base.config import setting
from ..base.errors import ConfigError, brief_repr
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from ..requests.request import Request
from ..store.steps import StepStore
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .intervals import percent, ratio, shown
from .probes import Probes, Progress, edited, images_of
from .residual import pictures_setting, state_of, states_setting


@dataclass(frozen=True)
class RelapseConfig(AuditConfig):
    """Settings of `Relapse`."""

    OF_BUDGET: ClassVar = {
        "quick": {"pictures": 4, "states": 8},
        "thorough": {"pictures": 24, "states": 24},
    }
    store: str = setting("", "Folder of the step store that the chain was made with.")
    pictures: int = pictures_setting()
    states: int = states_setting()


@AUDITS.register(
    "relapse",
    config=RelapseConfig,
    display_name="Relapse",
    description="Follows what each request of a chain forgot through all later requests, with the models "
    "that the step store has kept, and tells what came back; in percent of what the untouched model knows.",
    paper="Our own; the residual score is after ReLAPSe, arXiv 2602.00350",
)
class Relapse(Audit):
    """Residual score of the name of every target after its own and each later request of the chain.

    Nothing is trained: the model after each request is the store's. All models are asked at the same noised
    images. The relapse of a concept is its last score minus the first.

    Raises:
        ConfigError: the store lacks a step of the chain, or there is no chain of requests.
    """

    config: RelapseConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Progress = lambda done, total: None,
    ) -> AuditReport:
        chain = stored_chain(model, Path(self.config.store) if self.config.store else None)
        targets = {
            concept: number
            for number, edited_model in reversed(list(enumerate(chain)))
            for concept in _targets_of(edited_model)
            if not concepts or concept.name in [asked.name for asked in concepts]
        }
        total, done, figures, lines, back = len(targets), 0, {}, [], []
        for concept, first in sorted(targets.items(), key=lambda item: item[1]):
            on_progress(done, total)
            scores = self._scores(network, concept, chain[first:])
            for number, score in enumerate(scores, first + 1):
                figures[f"{concept.name}: after request {number}"] = score
            lines.append(f"{concept.name}: " + ", ".join(map(shown, scores)))
            if state_of(scores[-1]) not in ("forgotten", "not measured") and scores[-1].low > scores[0].high:
                back.append(concept.name)
            done += 1
        on_progress(total, total)
        outcome = f"{', '.join(back)} came back" if back else "nothing came back"
        return AuditReport(figures, f"After {len(chain)} requests, {outcome}.", "\n".join(lines))

    def _scores(self, network: Network, concept: Concept, models: Sequence[UnlearnModel]) -> list[Figure]:
        images = images_of(network, concept, self.config.pictures, self.config.seed)
        probes = Probes.of(network, images, self.config.states, self.config.seed, concept.name)
        whole, found = probes.gains(network, [concept.prompt])[concept.prompt], []
        for each in models:
            with edited(network, each):
                left = probes.gains(network, [concept.prompt])[concept.prompt]
            found.append(percent(ratio(left, whole)))
        return found


def stored_chain(model: UnlearnModel, folder: Path | None) -> list[UnlearnModel]:
    """The models after each request of the model's history, from a step store.

    Raises:
        ConfigError: the folder has no such steps, or the history has no request or a merge.
    """
    if folder is None or not folder.is_dir():
        raise ConfigError(f"The store {brief_repr(str(folder or ''))} is no folder; give the step store.")
    if not model.history or any(record.is_merge for record in model.history):
        raise ConfigError("The model has no chain of requests alone; audit one that was made step by step.")
    store, chain, current = StepStore(folder), [], UnlearnModel(model.source, model.family)
    for number, record in enumerate(model.history, 1):
        found = store.get(current, Request.from_json(record.request))
        if found is None:
            raise ConfigError(
                f"The store {folder.name!r} lacks step {number} of the chain; repeat the chain with it."
            )
        current = found[0]
        chain.append(current)
    return chain


def _targets_of(model: UnlearnModel) -> list[Concept]:
    return [Concept.from_json(values) for values in model.history[-1].request["concepts"]]
