"""The suites of MiniCanvas' worlds: order of requests, retained concepts, prompts of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..audits.classifier_scores import Shot
from ..concepts.concept import Concept
from .large import LARGE, ORDER_NAMES, alternating, shuffled
from .world import OBJECTS, REQUEST_ORDERS, SMALL, World, styles_in


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
        world: what the images show.
        kind: of the targets as concepts; the domain if empty.
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
    world: World = SMALL
    kind: str = ""

    @property
    def longest(self) -> int:
        """Number of requests of a whole run."""
        return len(next(iter(self.orders.values())))

    def concepts(self, targets: Sequence[str]) -> tuple[Concept, ...]:
        return tuple(
            Concept(target, self.kind or self.domain, self.anchors.get(target, "")) for target in targets
        )

    def keep(self) -> tuple[Concept, ...]:
        """The retained concepts that a request declares."""
        return tuple(Concept(name, self.kind or self.domain) for name in self.declared)

    def near(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The hidden concepts that differ from a target by colour alone or by period alone."""
        near = {name for target in targets for name in self.world.near.get(target, ())}
        return tuple(name for name in self.hidden if name in near)

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
        styles, templates = self.world.style_by_name, self.world.templates
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
                templates.evaluation.format(
                    object=self.world.phrase(thing), style=styles[style].display_name
                ),
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
            descriptions = styles[style].descriptions
            shots += [
                Shot(
                    templates.described_evaluation.format(
                        object=self.world.phrase(name), description=descriptions[number % len(descriptions)]
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
_LARGE_STYLES = Suite(
    "large_styles",
    "style",
    {name: alternating(LARGE.styles, LARGE.styles_in("forget"), name) for name in ORDER_NAMES},
    declared=LARGE.styles_in("declared"),
    hidden=LARGE.styles_in("hidden"),
    across=(*LARGE.objects[::2], *LARGE.people_labels[::2]),
    marks=(1, 4, 12, 24, 48, 56),
    world=LARGE,
)
_RETAINED_STYLES = (*LARGE.styles_in("declared")[::2], *LARGE.styles_in("hidden")[1::2])
_LARGE_ANCHORS = {
    **OBJECT_SUITE.anchors,
    "mushroom": "bell",
    "umbrella": "bell",
    "rocket": "house",
    "car": "house",
}
_LARGE_OBJECTS = Suite(
    "large_objects",
    "object",
    {name: shuffled(_LARGE_ANCHORS, name) for name in ORDER_NAMES},
    declared=("flower", "house", "bell"),
    hidden=("moon", "cup", "crown"),
    across=_RETAINED_STYLES,
    marks=(1, 4, 10),
    anchors=_LARGE_ANCHORS,
    iterations_factor=2,
    world=LARGE,
)
_FORGOTTEN_PEOPLE = tuple(name for name in LARGE.people_labels if name not in ("Ines_Quill", "Juno_Tamsel"))
_PEOPLE = Suite(
    "people",
    "object",
    {name: shuffled(_FORGOTTEN_PEOPLE, name) for name in ORDER_NAMES},
    declared=("Ines_Quill",),
    hidden=("Juno_Tamsel",),
    across=_RETAINED_STYLES,
    marks=(1, 3, 6),
    anchors=dict.fromkeys(_FORGOTTEN_PEOPLE, "Ines_Quill"),
    iterations_factor=2,
    world=LARGE,
    kind="celebrity",
)
_OF_WORLD = {
    SMALL.name: (STYLE_SUITE, OBJECT_SUITE),
    LARGE.name: (_LARGE_STYLES, _LARGE_OBJECTS, _PEOPLE),
}
SUITES = {suite.name: suite for suites in _OF_WORLD.values() for suite in suites}


def suite_of(names: Sequence[str], world: World = SMALL) -> tuple[Suite, list[str]]:
    """(suite, names of it among `names`): the first with a name among styles, objects and people."""
    labels = dict.fromkeys(name.strip().replace(" ", "_") for name in names)
    spelt = {name.lower(): name for name in world.subjects}
    subjects = [spelt[label.lower()] for label in labels if label.lower() in spelt]
    found = (
        [label for label in labels if label in world.style_by_name],
        [name for name in subjects if name in world.objects],
        [name for name in subjects if name in world.people_labels],
    )
    suites = _OF_WORLD[world.name]
    return next(
        ((suite, of_it) for suite, of_it in zip(suites, found, strict=False) if of_it), (suites[0], [])
    )
