"""The suites of MiniCanvas' worlds: order of requests, retained concepts, prompts of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..audits.classifier_scores import Shot
from ..base.errors import ConfigError, brief_repr
from ..concepts.concept import Concept, display_name
from .large import LARGE, ORDER_NAMES, alternating, shuffled
from .world import OBJECTS, REQUEST_ORDERS, SMALL, World, styles_in

BLIND = ("names", "descriptions", "nothing")
"""What the made-up names of methods hold no word of: the names that no method is told of; these names and
their descriptions; or nothing, as in figures from before this choice."""


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
        further: retained concepts that a longer chain forgets after the others, in this order.
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
    further: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Number of requests of a whole run."""
        return len(next(iter(self.orders.values())))

    @property
    def most(self) -> int:
        """Largest number of requests, with the `further` ones."""
        return self.longest + len(self.further)

    def with_requests(self, count: int) -> Suite:
        """The suite for a chain of `count` requests: beyond `longest`, retained concepts become targets.

        Raises:
            ConfigError: the suite has fewer concepts to forget.
        """
        if not 1 <= count <= self.most:
            raise ConfigError(
                f"{count} requests are asked for, and the suite of {self.name} has {self.most} concepts to "
                f"forget; give a number from 1 to {self.most}."
            )
        if count <= self.longest:
            return self
        more = self.further[: count - self.longest]
        return replace(
            self,
            orders={name: (*order, *more) for name, order in self.orders.items()},
            declared=tuple(name for name in self.declared if name not in more),
            hidden=tuple(name for name in self.hidden if name not in more),
            further=(),
        )

    def order(self, name: str) -> tuple[str, ...]:
        """The targets in the order called `name`; a letter without an order of its own seeds a random one.

        Raises:
            ConfigError: `name` is not a lower-case letter.
        """
        if name in self.orders:
            return self.orders[name]
        if not re.fullmatch("[a-z]", name):
            raise ConfigError(f"There is no order {brief_repr(name)} of requests; give a letter from a to z.")
        return shuffled(next(iter(self.orders.values())), name)

    def withheld_words(self, blind: str, untold: Iterable[str]) -> frozenset[str]:
        """Words, with their plurals, that no made-up name may hold.

        Args:
            blind: one of `BLIND`.
            untold: concepts that no method is told of.
        """
        texts = [] if blind == "nothing" else [display_name(name) for name in untold]
        if blind == "descriptions":
            texts += [text for name in untold for text in self.world.descriptions(name)]
        words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
        return frozenset(word + end for word in words for end in ("", "s", "es"))

    def concepts(self, targets: Sequence[str]) -> tuple[Concept, ...]:
        return tuple(
            Concept(target, self.kind or self.domain, self.anchors.get(target, "")) for target in targets
        )

    def keep(self) -> tuple[Concept, ...]:
        """The retained concepts that a request declares."""
        return tuple(Concept(name, self.kind or self.domain) for name in self.declared)

    def near(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The hidden concepts that are near neighbours of a target (see `World.neighbours`)."""
        near = {name for target in targets for name in self.world.neighbours(target)}
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


def further_styles() -> tuple[str, ...]:
    """One more style of each family of the small world, declared and hidden ones in turn."""
    families = zip(styles_in("declared"), styles_in("hidden"), strict=True)
    return tuple(pair[number % 2] for number, pair in enumerate(families))


STYLE_SUITE = Suite(
    "styles",
    "style",
    REQUEST_ORDERS,
    declared=styles_in("declared"),
    hidden=styles_in("hidden"),
    across=OBJECTS,
    marks=(1, 4, 8, 12),
    further=further_styles(),
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
