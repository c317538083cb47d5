"""The classification audit: a family's own classifier labels sampled images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base.config import setting
from ..base.errors import ModelError
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.family import FAMILIES, Family, supported
from ..models.network import Network
from ..requests.request import Request
from ..training.early_stopping import Measure
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .classifier_scores import Scores, table


class Classifier(ABC):
    """Recognizes the concepts of one family in images; `Family.classifier` makes one."""

    @abstractmethod
    def check(self, names: Sequence[str]) -> None:
        """Raises ConceptError for a name the classifier does not know, or for names of several domains."""

    def names(self, kind: str) -> tuple[str, ...]:
        """Names of a kind of concepts that the classifier knows."""
        return ()

    @abstractmethod
    def count(self, names: Sequence[str], per_cell: int) -> int:
        """Number of images that `evaluate` samples."""

    @abstractmethod
    def evaluate(
        self,
        network: Network,
        model: UnlearnModel,
        names: Sequence[str],
        *,
        seed: int,
        per_cell: int = 1,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        """Scores of a model, with the `names` that the classifier knows as targets.

        Args:
            network: the pretrained model.
            model: the edits.
            names: forgotten concepts.
            seed: of the images.
            per_cell: images per concept and name of the other domain.
            on_batch: called with the number of images done; may raise to stop.
        """

    @abstractmethod
    def measure_for(self, request: Request) -> Measure:
        """The measure with which early stopping scores a request; raises ConceptError if there is none."""


def classifier_of(family: Family) -> Classifier:
    """The family's classifier.

    Raises:
        ModelError: the family has none.
    """
    if family.classifier is None:
        others = supported(other for other in FAMILIES.values() if other.classifier is not None)
        raise ModelError(
            f"For {family.display_name} there is no classifier; choose a checkpoint of {others}, or compare "
            "images by eye."
        )
    return family.classifier()


@dataclass(frozen=True)
class ClassificationConfig(AuditConfig):
    pictures: int = setting(1, "Images per concept and name of the other domain.", minimum=1, maximum=1000)


@AUDITS.register(
    "classification",
    config=ClassificationConfig,
    display_name="Classification",
    description="Samples images of what should be gone and of what should be left, and classifies them; in "
    "percent.",
    paper="Zhang et al., UnlearnCanvas, NeurIPS 2024, arXiv 2402.11846",
)
class Classification(Audit):
    """UA, clean forgetting, leak, IRA and CRA by the family's classifier; see `classifier_scores.Scores`."""

    config: ClassificationConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> AuditReport:
        classifier, pictures = classifier_of(model.family), self.config.pictures
        names = [concept.target for concept in concepts]
        classifier.check(names)
        names = names or [values["target"] for values in model.forgotten]
        total = classifier.count(names, pictures)
        scores = classifier.evaluate(
            network,
            model,
            names,
            seed=self.config.seed,
            per_cell=pictures,
            on_batch=lambda done: on_progress(min(done, total), total),
        )
        values = scores.to_json()
        figures = {name: Figure(values[name], *interval) for name, interval in scores.intervals.items()}
        outcome = "nothing was asked of it" if scores.ua is None else f"{scores.ua:.0f} % of it is gone"
        verdict = f"Of {', '.join(names) or 'no concept'}: {outcome}."
        return AuditReport(figures, verdict, table([(model.family.display_name, values)]))
