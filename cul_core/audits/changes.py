"""What else changed: how far predictions moved for names that no request forgot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import setting
from ..concepts.concept import Concept
from ..concepts.name_lists import listed_names
from ..concepts.parsing import parse_keep
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .intervals import mean, percent, ratio, shown
from .probes import Probes, Progress, audited_concepts, edited, images_of, made_up_names
from .residual import pictures_setting, states_setting

_NOTABLE, _LOST = 1.0, 50.0
"""Divergence in percent from which a name is worse, and direct change above which it is lost."""
_NEAR_IMAGES, _NEAR_STATES = 4, 4
"""Images of a concept, and their noise levels, at which its neighbours are found: 16 states."""


def domain_names(network: Network, kind: str, further: str = "") -> list[Concept]:
    """Concepts of a kind among which neighbours are looked for: `further` names first, then those that the
    family's classifier knows, then our lists. Names that a closed vocabulary does not know are left out."""
    family = network.family
    known = family.classifier().names(kind) if family.classifier is not None else ()
    listed = [concept for concept in listed_names("auto", [kind]) if concept.kind == kind]
    found = [*parse_keep(further, kind), *(Concept(name, kind) for name in known), *listed]
    if family.closed_vocabulary:
        found = [c for c in found if network.token_count(c.name) == len(c.name.split())]
    unique: dict[str, Concept] = {}
    for concept in found:
        unique.setdefault(concept.name.lower(), concept)
    return list(unique.values())


def without(concepts: Iterable[Concept], others: Iterable[Concept]) -> list[Concept]:
    """The concepts whose names are none of the others'; case does not count."""
    taken = {other.name.lower() for other in others}
    return [concept for concept in concepts if concept.name.lower() not in taken]


@torch.no_grad()
def neighbours(
    network: Network,
    probes: Probes,
    concept: Concept,
    among: Sequence[Concept],
    count: int,
    check: Callable[[], None] = lambda: None,
) -> list[Concept]:
    """The `count` concepts whose predictions are nearest to the concept's own, nearest first.

    The distance is the mean of |f_0(z_t, t, n) - f_0(z_t, t, c)|^2 over states of images of c.
    """
    own, distances = probes.predictions(network, concept.prompt), {}
    for other in among:
        check()
        difference = probes.predictions(network, other.prompt) - own
        distances[other] = probes.per_image(difference).mean().item()
    return sorted(distances, key=distances.__getitem__)[:count]


@dataclass(frozen=True)
class ChangesConfig(AuditConfig):
    """Settings of `Changes`."""

    OF_BUDGET: ClassVar = {
        "quick": {"pictures": 3, "states": 6, "neighbours": 3, "made_up": 3},
        "thorough": {"pictures": 8, "states": 24, "neighbours": 20, "made_up": 20},
    }
    pictures: int = pictures_setting(4)
    states: int = states_setting()
    neighbours: int = setting(
        10,
        "Names next to each forgotten concept that nobody declared; they are found.",
        minimum=0,
        maximum=1000,
    )
    made_up: int = setting(5, "Made-up names to look at.", minimum=0, maximum=1000)
    names: str = setting("", "Further names to look at and among, separated by commas.")


@AUDITS.register(
    "changes",
    config=ChangesConfig,
    display_name="What Else Changed",
    description="Measures how far an edit moved what should have stayed: declared names, near names that it "
    "finds, and made-up ones; sorted, in percent. Of the edited model no image is sampled.",
    paper="After the scores of Diffusing States and Matching Scores, arXiv 2410.13855",
)
class Changes(Audit):
    """Score divergence and direct change of every name, on images of it by W0.

    divergence = (sum |f_k - y|^2 - |f_0 - y|^2) / sum |f_0 - y|^2, where y is the ideal prediction: 0 where
    the model predicts as well as before.
    direct change = sum |f_k(c) - f_0(c)|^2 / sum |f_0(c) - f_0("")|^2: 100 % where the edit changes
    predictions as much as the prompt itself does.

    A name is `worse` if its divergence is at least 1 %, and above 0 by its interval; it is `lost` if its
    direct change is above 50 % too.

    Groups: `forgotten` for comparison, `declared` in the history, `near` (the neighbours of what is forgotten
    in the names that the user, the family's classifier or our lists give), `asked` for the user's other
    names, and `random` made-up names.

    Budget: for each name `pictures` sampled images and 3 x `pictures` x `states` predictions; for each
    concept 16 predictions for every name among which neighbours are found.
    """

    config: ChangesConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Progress = lambda done, total: None,
    ) -> AuditReport:
        concepts = audited_concepts(model, concepts)
        groups = self._groups(network, model, concepts, lambda: on_progress(0, 1))
        names = [(group, concept) for group, found in groups.items() for concept in found]
        rows = []
        for done, (group, concept) in enumerate(names):
            on_progress(done, len(names))
            rows.append((group, concept, *self._measure(network, model, concept)))
        on_progress(len(names), len(names))
        return _report(rows)

    def _groups(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        check: Callable[[], None],
    ) -> dict[str, list[Concept]]:
        config = self.config
        forgotten = [*concepts, *(Concept.from_json(values) for values in model.forgotten)]
        declared = without(declared_concepts(model), forgotten)
        near: list[Concept] = []
        for concept in concepts if config.neighbours else ():
            images = images_of(network, concept, _NEAR_IMAGES, config.seed, lambda done: check())
            probes = Probes.of(network, images, _NEAR_STATES, config.seed, concept.name)
            among = domain_names(network, concept.kind, config.names)
            among = without(among, [*forgotten, *declared])
            near += neighbours(network, probes, concept, among, config.neighbours, check)
        kind = concepts[0].kind if concepts[0].kind != "memorized" else "style"
        made_up = [Concept(name, kind) for name in made_up_names(network, config.made_up, config.seed)]
        asked = without(parse_keep(config.names, kind), [*forgotten, *declared, *near])
        return {
            "forgotten": list(concepts),
            "declared": declared,
            "near": list(dict.fromkeys(near)),
            "asked": asked,
            "random": made_up,
        }

    def _measure(self, network: Network, model: UnlearnModel, concept: Concept) -> tuple[Figure, Figure]:
        """(divergence, direct change) of a name in percent."""
        config = self.config
        images = images_of(network, concept, config.pictures, config.seed)
        probes = Probes.of(network, images, config.states, config.seed, concept.name)
        before, empty = (probes.predictions(network, prompt) for prompt in (concept.prompt, ""))
        with edited(network, model):
            after = probes.predictions(network, concept.prompt)
        return divergence(probes, before, after), direct_change(probes, before, after, empty)


def divergence(probes: Probes, before: Tensor, after: Tensor) -> Figure:
    """How much larger the error of `after` is than that of `before`, in percent of it."""
    errors = [probes.per_image(predicted - probes.targets) for predicted in (before, after)]
    return percent(ratio(errors[1] - errors[0], errors[0]))


def direct_change(probes: Probes, before: Tensor, after: Tensor, empty: Tensor) -> Figure:
    """Change of the predictions, in percent of how far the prompt moves them from those without a prompt."""
    return percent(ratio(probes.per_image(after - before), probes.per_image(before - empty)))


def declared_concepts(model: UnlearnModel) -> list[Concept]:
    """The concepts that the model's requests retain."""
    found = [
        Concept.from_json(values) for record in model.history for values in record.request.get("retain", ())
    ]
    return list(dict.fromkeys(found))


def _state_of(change: Figure, direct: Figure) -> str:
    if change.low is None or change.low <= 0 or change.value < _NOTABLE:
        return "as before"
    return "lost" if direct.low is not None and direct.low > _LOST else "worse"


def _report(rows: Sequence[tuple[str, Concept, Figure, Figure]]) -> AuditReport:
    figures: dict[str, Figure] = {}
    by_group: dict[str, list[Figure]] = {}
    for group, concept, change, direct in rows:
        figures |= {f"{concept.name}: divergence": change, f"{concept.name}: direct change": direct}
        by_group.setdefault(group, []).append(change)
    figures |= {f"{group}: divergence": _mean_of(changes) for group, changes in by_group.items()}
    rows = sorted(rows, key=lambda row: -(row[2].value or 0.0))
    width = max(len(concept.name) for _, concept, *_ in rows)
    lines = [f"{'':{width}}  {'':9}  {'divergence %':>24}  {'direct change %':>24}"]
    for group, concept, change, direct in rows:
        state = _state_of(change, direct)
        cells = f"{shown(change, 1):>24}  {shown(direct, 1):>24}"
        lines.append(f"{concept.name:{width}}  {group:9}  {cells}  {state}")
    kept = [row for row in rows if row[0] != "forgotten"]
    moved = [row[1].name for row in kept if _state_of(*row[2:]) != "as before"]
    worst = f"; most {moved[0]}" if moved else ""
    verdict = (
        f"Of {len(kept)} names that nothing asked to forget, {len(moved)} are predicted worse than before"
    )
    return AuditReport(figures, f"{verdict}{worst}.", "\n".join(lines))


def _mean_of(figures: Sequence[Figure]) -> Figure:
    return mean(torch.tensor([figure.value for figure in figures if figure.value is not None]))
