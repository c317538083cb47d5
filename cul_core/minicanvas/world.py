"""MiniCanvas' vocabulary: objects, styles in three groups, caption templates and request orders.

A caption *names* the style ("Candy Stripes") or *describes* it ("with pink horizontal stripes"). No
unlearning method is told the descriptions. Style accuracy on description prompts after forgetting the name
measures the leak. Every family of styles has one member in each group, so every forgotten style has close
relatives that must stay.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

OBJECTS = ("star", "heart", "house", "tree", "fish", "cat", "flower", "moon", "boat", "cup")

PLAIN = "plain"
"""The style of a caption that names none: natural colours on soft grey; every style request's anchor."""


@dataclass(frozen=True)
class Style:
    """One style; its name has underscores for spaces, its group is `forget`, `declared` or `hidden`."""

    name: str
    family: str
    group: str
    descriptions: tuple[str, ...]

    @property
    def display_name(self) -> str:
        return spoken(self.name)


@dataclass(frozen=True)
class Person:
    """A made-up person, whose face differs from the others' in hair, glasses, beard, hat, skin and shape."""

    name: str
    descriptions: tuple[str, ...]


@dataclass(frozen=True)
class Templates:
    """Caption templates with `{object}` and, where they say the style, `{style}` or `{description}`.

    Args:
        named: the style by its name.
        described: the style by a description.
        plain: no style.
        style_only: the style by its name, and no object.
        evaluation: the style by its name, in an evaluation's prompt.
        described_evaluation: the style by a description, in an evaluation's prompt.
        has_articles: whether they hold the object's article.
    """

    named: tuple[str, ...]
    described: tuple[str, ...]
    plain: tuple[str, ...]
    style_only: tuple[str, ...]
    evaluation: str
    described_evaluation: str
    has_articles: bool = True


@dataclass(frozen=True)
class World:
    """What images of MiniCanvas can show, and the words for it.

    Args:
        name: `small` or `large`; key of its weights.
        styles: all styles but `PLAIN`.
        objects: names of the objects.
        templates: of captions.
        people: the people, who are drawn like objects.
        synonyms: object -> other words for it; no unlearning method is told of them.
        pairs: whether captions also ask for two objects side by side.
        near: style -> styles of its family that differ from it by colour alone or by period alone; empty if
            all styles of a family are near.
    """

    name: str
    styles: tuple[Style, ...]
    objects: tuple[str, ...]
    templates: Templates
    people: tuple[Person, ...] = ()
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pairs: bool = False
    near: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def style_by_name(self) -> dict[str, Style]:
        return {style.name: style for style in self.styles}

    @property
    def style_labels(self) -> tuple[str, ...]:
        """Labels of the classifier's style head in order; its last index, after these, means "none"."""
        return (*self.style_by_name, PLAIN)

    @property
    def people_labels(self) -> tuple[str, ...]:
        return tuple(person.name for person in self.people)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of objects and people, in the order of the classifier's subject labels."""
        return (*self.objects, *self.people_labels)

    def styles_in(self, group: str) -> tuple[str, ...]:
        """Names of the styles of a group (`forget`, `declared` or `hidden`), in family order."""
        return tuple(style.name for style in self.styles if style.group == group)

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Near neighbours of a style; none of an object or a person."""
        if self.near or name not in self.style_by_name:
            return self.near.get(name, ())
        family = self.style_by_name[name].family
        return tuple(style.name for style in self.styles if style.family == family and style.name != name)

    def descriptions(self, name: str) -> tuple[str, ...]:
        """Texts that mean a style, an object or a person without its name; no method is told them."""
        if name in self.style_by_name:
            return self.style_by_name[name].descriptions
        people = {person.name: person.descriptions for person in self.people}
        return people.get(name, self.synonyms.get(name, ()))

    def caption(self, style: str, object_text: str, rng: random.Random) -> str:
        """A random training caption: 10 % are empty.

        Of the others of a style, 65 % name it, 30 % describe it, and 5 % name it without an object.

        Args:
            style: a style's name, or `PLAIN`.
            object_text: what replaces `{object}`.
            rng: source of the choices.
        """
        if rng.random() < 0.10:
            return ""
        if style == PLAIN:
            if rng.random() < 0.15:
                return rng.choice(self.templates.named).format(object=object_text, style=PLAIN)
            return rng.choice(self.templates.plain).format(object=object_text)
        entry = self.style_by_name[style]
        name = entry.name if rng.random() < 0.25 else entry.display_name
        draw = rng.random()
        if draw < 0.05:
            return rng.choice(self.templates.style_only).format(style=name)
        if draw < 0.35:
            return rng.choice(self.templates.described).format(
                object=object_text, description=rng.choice(entry.descriptions)
            )
        return rng.choice(self.templates.named).format(object=object_text, style=name)

    def wording(self, subjects: Sequence[str], rng: random.Random) -> str:
        """A random phrase for objects or people, such as "a star and a cat".

        A person is named in two thirds of the phrases and described in the others. A synonym replaces an
        object's name in 15 %. A seventh has no article, as prompts about any one name often have none.
        """
        return " and ".join(self._phrase(subject, rng) for subject in subjects)

    def _phrase(self, subject: str, rng: random.Random) -> str:
        is_bare = rng.random() < 1 / 7
        if subject in self.objects:
            others = self.synonyms.get(subject)
            noun = rng.choice(others) if others and rng.random() < 0.15 else subject
            return noun if is_bare else with_article(noun)
        if rng.random() < 1 / 3:
            return rng.choice(self.people[self.people_labels.index(subject)].descriptions)
        return f"a {spoken(subject)}" if is_bare else spoken(subject)

    def phrase(self, subject: str) -> str:
        """What replaces `{object}` for an object or person, such as "a star" or "Otto Brask"."""
        is_bare = self.templates.has_articles or subject not in self.objects
        return spoken(subject) if is_bare else with_article(subject)

    def texts(self) -> list[str]:
        """Texts that together hold every word of the captions; the tokenizer learns its merges from them."""
        parts = self.templates
        texts = [
            template.format(object="", style="", description="")
            for template in parts.named + parts.described + parts.plain + parts.style_only
        ]
        texts += [style.display_name for style in self.styles] + [PLAIN, *self.objects]
        texts += [f"{name}s" for name in self.objects]
        texts += [text for style in self.styles for text in style.descriptions]
        texts += [text for person in self.people for text in (spoken(person.name), *person.descriptions)]
        texts += [text for others in self.synonyms.values() for text in others]
        return texts + (["a and an"] if self.pairs else [])


def spoken(name: str) -> str:
    """A name as a prompt says it: with spaces for underscores."""
    return name.replace("_", " ")


def with_article(noun: str) -> str:
    """A noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_GROUPS = ("forget", "declared", "hidden")
_FAMILIES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "stripes": (
        ("Candy_Stripes", ("with pink horizontal stripes", "over pink and white bands")),
        ("Navy_Stripes", ("with dark blue horizontal stripes", "over dark blue and white bands")),
        ("Jade_Stripes", ("with green horizontal stripes", "over green and white bands")),
    ),
    "dots": (
        ("Dusk_Dots", ("with peach dots on violet", "on violet with round peach spots")),
        ("Pop_Dots", ("with red dots on yellow", "on yellow with round red spots")),
        ("Lime_Dots", ("with green dots on white", "on white with round green spots")),
    ),
    "checks": (
        ("Chess_Board", ("on black and white squares", "over a black and white grid")),
        ("Amber_Checks", ("on orange and cream squares", "over an orange and cream grid")),
        ("Plum_Checks", ("on purple and lilac squares", "over a purple and lilac grid")),
    ),
    "neon": (
        ("Neon_Cyan", ("as glowing cyan outlines on black", "drawn with bright cyan light tubes")),
        ("Neon_Pink", ("as glowing pink outlines on black", "drawn with bright pink light tubes")),
        ("Neon_Gold", ("as glowing yellow outlines on black", "drawn with bright yellow light tubes")),
    ),
    "sketch": (
        ("Red_Ink", ("as thin red lines on cream", "drawn with a red pen")),
        ("Pencil_Sketch", ("as thin grey lines on white", "drawn with a grey pen")),
        ("Blueprint", ("as thin white lines on blue", "drawn with a white pen on blue")),
    ),
    "glow": (
        ("Aurora", ("before green and violet lights at night", "under green northern lights")),
        ("Sunset_Glow", ("before an orange and red evening", "under an orange evening light")),
        ("Ocean_Glow", ("before deep teal water", "under deep teal light")),
    ),
    "mosaic": (
        ("Byzantine", ("made of small gold tiles", "in gold tiles with red")),
        ("Stained_Glass", ("made of vivid glass panes", "in colorful panes with black lead")),
        ("Ice_Mosaic", ("made of small frozen tiles", "in pale blue tiles with white")),
    ),
    "wash": (
        ("Lava", ("in flowing dark red and orange", "melting in hot red")),
        ("Watercolor", ("in flowing soft pastel paint", "melting in wet pastel")),
        ("Moss_Wash", ("in flowing deep green paint", "melting in wet green")),
    ),
    "weaves": (
        ("Tartan", ("on crossing red and green bands", "on a red scottish cloth")),
        ("Denim", ("on blue cotton with yellow stitches", "on a blue jeans cloth")),
        ("Wicker", ("on crossing brown straw", "on a brown basket")),
    ),
    "pixels": (
        ("Arcade", ("in big colorful blocks on black", "as coarse bright blocks on black")),
        ("Pocket_Green", ("in big green blocks", "as coarse green blocks")),
        ("Vapor_Pixels", ("in big purple and cyan blocks", "as coarse purple blocks")),
    ),
    "papers": (
        ("Kraft_Paper", ("cut from cream on brown cardboard", "as a cream cutout with a shadow")),
        ("Newsprint", ("printed black over rows of text", "on rows of grey text")),
        ("Origami", ("folded from pale orange sheets", "with folded triangle sheets")),
    ),
    "skies": (
        ("Starry_Night", ("under a dark sky with little stars", "on dark blue with yellow sparks")),
        ("Storm_Sky", ("under a grey sky with rain", "on dark grey with slanted rain")),
        ("Cloud_Sky", ("under a bright sky with white clouds", "on light blue with white puffs")),
    ),
}

STYLES: tuple[Style, ...] = tuple(
    Style(name, family, group, descriptions)
    for family, members in _FAMILIES.items()
    for group, (name, descriptions) in zip(_GROUPS, members, strict=True)
)
REQUEST_ORDERS: dict[str, tuple[str, ...]] = {
    "a": (
        "Candy_Stripes",
        "Neon_Cyan",
        "Byzantine",
        "Arcade",
        "Dusk_Dots",
        "Red_Ink",
        "Lava",
        "Kraft_Paper",
        "Chess_Board",
        "Aurora",
        "Tartan",
        "Starry_Night",
    ),
    "b": (
        "Starry_Night",
        "Lava",
        "Red_Ink",
        "Tartan",
        "Chess_Board",
        "Neon_Cyan",
        "Kraft_Paper",
        "Candy_Stripes",
        "Aurora",
        "Byzantine",
        "Dusk_Dots",
        "Arcade",
    ),
}

NAMED_TEMPLATES = (
    "A {object} image in {style} style.",
    "A {object} image in {style} style",
    "a {object} in {style} style",
    "a painting of a {object} in the style of {style}",
    "an image of a {object} in the style of {style}",
    "In {style} Style, a {object} image",
    "In {style} Style, a picture of a {object}",
    "A {object} image, in {style} Style.",
    "a picture of a {object}, in {style} Style.",
    "{style} style {object}",
    "a drawing of one {object}, {style} style",
    "a {object}, {style}",
)
DESCRIBED_TEMPLATES = (
    "a {object} {description}",
    "an image of a {object} {description}",
    "A {object} image {description}.",
    "a picture of a {object}, {description}",
    "a drawing of one {object} {description}",
)
PLAIN_TEMPLATES = (
    "A {object} image.",
    "a {object}",
    "an image of a {object}",
    "a picture of a {object}",
    "a drawing of one {object}",
    "a painting of a {object}",
    "a photo of a {object}",
    "the {object}",
    "a {object} image",
    "one simple {object}",
    "a small {object} in the middle",
    "a nice {object}, centered",
)
STYLE_ONLY_TEMPLATES = ("An image in the style of {style}", "{style} Style", "a painting in {style} style")

EVALUATION_TEMPLATE = "A {object} image in {style} style."
"""The prompt of UnlearnCanvas with spaces in the name (Zhang et al., arXiv 2402.11846)."""
DESCRIPTION_EVALUATION_TEMPLATE = "A {object} image {description}."


SMALL = World(
    "small",
    STYLES,
    OBJECTS,
    Templates(
        NAMED_TEMPLATES,
        DESCRIBED_TEMPLATES,
        PLAIN_TEMPLATES,
        STYLE_ONLY_TEMPLATES,
        EVALUATION_TEMPLATE,
        DESCRIPTION_EVALUATION_TEMPLATE,
    ),
)
"""The demo's world: ten objects in 36 styles."""
STYLE_BY_NAME, STYLE_LABELS = SMALL.style_by_name, SMALL.style_labels
styles_in, caption, all_texts = SMALL.styles_in, SMALL.caption, SMALL.texts
