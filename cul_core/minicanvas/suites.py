"""The two suites of MiniCanvas: what is forgotten in which order, what is kept, and what an evaluation asks
for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..audits.classifier_scores import Shot
from ..concepts.captions import anchor_prompts
from ..concepts.concept import Concept
from .family import MINI
from .world import (
    DESCRIPTION_EVALUATION_TEMPLATE,
    EVALUATION_TEMPLATE,
    OBJECTS,
    REQUEST_ORDERS,
    STYLE_BY_NAME,
    styles_in,
)


@dataclass(frozen=True)
class Suite:
    """Forgetting in one domain, with retention measured in it and across the other.

    Args:
        name: `styles` or `objects`.
        domain: `style` or `object`, what is forgotten; the other is the cross domain.
        orders: name -> targets in the order of the requests.
        declared: kept concepts that every method is told of.
        hidden: kept concepts that no method is told of.
        across: names of the cross domain that every concept is asked in.
        marks: after which requests there are measurements.
        anchors: target -> the word it becomes; a style needs none.
        iterations_factor: how many times a preset's iterations a request trains; the paper's scripts double
            them for objects.
    """

    name: str
    domain: str
    orders: Mapping[str, tuple[str, ...]]
    declared: tuple[str, ...]
    hidden: tuple[str, ...]
    across: tuple[str, ...]
    marks: tuple[int, ...]
    anchors: Mapping[str, str] = field(default_factory=dict)
    iterations_factor: int = 1

    @property
    def longest(self) -> int:
        """Requests of a whole run."""
        return len(next(iter(self.orders.values())))

    def concepts(self, targets: Sequence[str]) -> tuple[Concept, ...]:
        return tuple(Concept(target, self.domain, self.anchors.get(target, "")) for target in targets)

    def keep(self) -> tuple[Concept, ...]:
        """What a careful user would list as to be kept."""
        return tuple(Concept(name, self.domain) for name in self.declared)

    def captions(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Anchor prompts of a request for `targets`: plain pictures, of every object or of what the targets
        become."""
        return anchor_prompts(MINI, self.concepts(targets))

    def shots(
        self, targets: Sequence[str], per_cell: int = 1, across: Sequence[str] | None = None
    ) -> list[Shot]:
        """What an evaluation asks after `targets` were forgotten: each of them by name, all that is kept by
        name, and styles among the targets by description too, which no method is told of.
        """
        across = self.across if across is None else across
        by_role = {"target": targets, "declared": self.declared, "hidden": self.hidden}
        pairs = [
            (role, name, other)
            for role, names in by_role.items()
            for name in names
            if role == "target" or name not in targets
            for other in across
        ]
        shots = [
            Shot(
                EVALUATION_TEMPLATE.format(object=thing, style=STYLE_BY_NAME[style].display_name),
                style,
                thing,
                role,
                index,
            )
            for role, name, other in pairs
            for style, thing in [(name, other) if self.domain == "style" else (other, name)]
            for index in range(per_cell)
        ]
        for style in targets if self.domain == "style" else ():
            descriptions = STYLE_BY_NAME[style].descriptions
            shots += [
                Shot(
                    DESCRIPTION_EVALUATION_TEMPLATE.format(
                        object=name, description=descriptions[number % len(descriptions)]
                    ),
                    style,
                    name,
                    "alias",
                    index,
                )
                for number, name in enumerate(across)
                for index in range(per_cell)
            ]
        return shots


STYLE_SUITE = Suite(
    "styles",
    "style",
    REQUEST_ORDERS,
    declared=styles_in("declared"),
    hidden=styles_in("hidden"),
    across=OBJECTS,
    marks=(1, 4, 8, 12),
)
OBJECT_SUITE = Suite(
    "objects",
    "object",
    {
        "a": ("star", "fish", "boat", "cat", "heart", "tree"),
        "b": ("tree", "cat", "star", "heart", "boat", "fish"),
    },
    # the anchors are trained to stay, so they are the declared ones, and figures of those that are not stand
    # apart
    declared=("flower", "house"),
    hidden=("moon", "cup"),
    across=(*styles_in("declared"), *styles_in("hidden")),
    marks=(1, 2, 4, 6),
    anchors={
        "star": "flower",
        "fish": "house",
        "boat": "house",
        "cat": "flower",
        "heart": "flower",
        "tree": "house",
    },
    iterations_factor=2,
)
SUITES = {suite.name: suite for suite in (STYLE_SUITE, OBJECT_SUITE)}


def suite_of(names: Sequence[str]) -> tuple[Suite, list[str]]:
    """The suite that measures what was forgotten, and those of the names that it knows: objects if no style
    is among them."""
    labels = list(dict.fromkeys(name.strip().replace(" ", "_") for name in names))
    styles, objects = (
        [name for name in labels if name in STYLE_BY_NAME],
        [name.lower() for name in labels if name.lower() in OBJECTS],
    )
    return (OBJECT_SUITE, objects) if objects and not styles else (STYLE_SUITE, styles)
