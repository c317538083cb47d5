"""The two suites of MiniCanvas: order of requests, retained concepts, prompts of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..audits.classifier_scores import Shot
from ..concepts.concept import Concept
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
    """Requests in one domain; retention is measured in that domain and in the cross domain.

    Args:
        name: `styles` or `objects`.
        domain: domain of the targets, `style` or `object`; the other one is the cross domain.
        orders: name -> targets in the order of the requests.
        declared: retained concepts that every method is told of.
        hidden: retained concepts that no method is told of.
        across: names of the cross domain; every concept is combined with each of them.
        marks: numbers of the requests after which the model is measured.
        anchors: target -> its anchor; a style needs none.
        iterations_factor: multiplies a preset's iterations; the paper's scripts double them for objects.
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
        """Number of requests of a whole run."""
        return len(next(iter(self.orders.values())))

    def concepts(self, targets: Sequence[str]) -> tuple[Concept, ...]:
        return tuple(Concept(target, self.domain, self.anchors.get(target, "")) for target in targets)

    def keep(self) -> tuple[Concept, ...]:
        """The retained concepts that a request declares."""
        return tuple(Concept(name, self.domain) for name in self.declared)

    def shots(
        self, targets: Sequence[str], per_cell: int = 1, across: Sequence[str] | None = None
    ) -> list[Shot]:
        """The images that an evaluation samples after `targets` were forgotten.

        Targets and retained concepts are asked for by name. Target styles are also asked for by description,
        which no method is told of.

        Args:
            targets: forgotten names.
            per_cell: images per concept and name of the cross domain.
            across: names of the cross domain; all of the suite's if None.
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
    # training reinforces the anchors, so they are the declared concepts; the hidden ones are reported apart
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
    """(suite, names of it among `names`): the objects' suite if there are objects and no styles, else that of
    styles."""
    labels = list(dict.fromkeys(name.strip().replace(" ", "_") for name in names))
    styles, objects = (
        [name for name in labels if name in STYLE_BY_NAME],
        [name.lower() for name in labels if name.lower() in OBJECTS],
    )
    return (OBJECT_SUITE, objects) if objects and not styles else (STYLE_SUITE, styles)
