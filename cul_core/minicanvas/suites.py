"""The two suites of MiniCanvas: order of requests, retained concepts, prompts of an evaluation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..audits.classifier_scores import Shot
from ..base.errors import ConfigError, brief_repr
from ..concepts.concept import Concept, display_name
from .world import (
    DESCRIPTION_EVALUATION_TEMPLATE,
    EVALUATION_TEMPLATE,
    OBJECTS,
    REQUEST_ORDERS,
    STYLE_BY_NAME,
    STYLES,
    further_styles,
    styles_in,
)

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
        further: retained concepts that a longer chain forgets after the others, in this order.
        families: concept -> its family, within which concepts are near neighbours.
        descriptions: concept -> texts that describe it without its name.
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
    further: tuple[str, ...] = ()
    families: Mapping[str, str] = field(default_factory=dict)
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
        targets = list(next(iter(self.orders.values())))
        random.Random(f"order {name}").shuffle(targets)
        return tuple(targets)

    def withheld_words(self, blind: str, untold: Iterable[str]) -> frozenset[str]:
        """Words, with their plurals, that no made-up name may hold.

        Args:
            blind: one of `BLIND`.
            untold: concepts that no method is told of.
        """
        texts = [] if blind == "nothing" else [display_name(name) for name in untold]
        if blind == "descriptions":
            texts += [text for name in untold for text in self.descriptions.get(name, ())]
        words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
        return frozenset(word + end for word in words for end in ("", "s", "es"))

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
    further=further_styles(),
    families={style.name: style.family for style in STYLES},
    descriptions={style.name: style.descriptions for style in STYLES},
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
