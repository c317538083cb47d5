"""The vocabulary of MiniCanvas' large world: 112 styles in 28 families, 16 objects, 8 people.

A family is one pattern in two palettes and two periods. Each of its four styles has two near neighbours: one
that differs by colour alone and one that differs by period alone. Two styles of a family are to be forgotten,
one is declared and one is hidden. Names share no word with descriptions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .world import OBJECTS, Person, Style, Templates, World

COLOURS = {
    "pink": "rosy",
    "red": "scarlet",
    "orange": "apricot",
    "yellow": "lemon",
    "green": "emerald",
    "lime": "leafy",
    "teal": "turquoise",
    "blue": "azure",
    "violet": "purple",
    "brown": "chocolate",
    "grey": "silver",
    "black": "ebony",
}
"""Palettes by the word for them in a description, and the word in a paraphrase."""

_SIZES = {"wide": "broad", "narrow": "slim", "big": "large", "small": "tiny"}


@dataclass(frozen=True)
class Pattern:
    """One family: its styles in the order of `GRID`, the sizes' words, two palettes, and two wordings."""

    names: tuple[str, str, str, str]
    sizes: tuple[str, str]
    palettes: tuple[str, str]
    wordings: tuple[str, str]


GRID = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(period, palette) of a family's four styles; period 0 is the longer one."""


def _bands(names: str, palettes: str, *wordings: str) -> Pattern:
    return Pattern(tuple(names.split()), ("wide", "narrow"), tuple(palettes.split()), wordings)


def _things(names: str, palettes: str, *wordings: str) -> Pattern:
    return Pattern(tuple(names.split()), ("big", "small"), tuple(palettes.split()), wordings)


PATTERNS: dict[str, Pattern] = {
    "stripes": _bands(
        "Candy_Stripes Marina_Stripes Awning Breton",
        "pink blue",
        "with {size} {colour} level bands",
        "over {size} {colour} flat strips",
    ),
    "poles": _bands(
        "Cabana_Poles Marquee_Poles Bamboo Deckchair",
        "green orange",
        "with {size} {colour} upright bands",
        "over {size} {colour} standing strips",
    ),
    "slants": _bands(
        "Barber_Slant Foundry_Slant Peppermint Pinfeather",
        "red grey",
        "with {size} {colour} leaning bands",
        "over {size} {colour} sloping strips",
    ),
    "dots": _things(
        "Bumble_Dots Velvet_Dots Confetti Twilight",
        "yellow violet",
        "with {size} {colour} round spots",
        "over {size} {colour} circles",
    ),
    "checks": _things(
        "Chess_Board Tavern_Board Domino Marigold",
        "black orange",
        "on {size} {colour} squares",
        "over {size} {colour} alternating fields",
    ),
    "rings": _bands(
        "Lagoon_Rings Flamingo_Rings Ripple Bubblegum",
        "teal pink",
        "with {size} {colour} nested hoops",
        "over {size} {colour} bands around the middle",
    ),
    "grids": _bands(
        "Draft_Grid Ledger_Grid Lattice Waffle",
        "blue brown",
        "on a {size} {colour} net of lines",
        "over {size} {colour} ruled cells",
    ),
    "zigzags": _bands(
        "Iguana_Zigzag Panther_Zigzag Nettle Voltage",
        "lime black",
        "with {size} {colour} jagged bands",
        "over {size} {colour} sharp bends",
    ),
    "swells": _bands(
        "Harbor_Swell Dusk_Swell Tideline Orchid",
        "blue violet",
        "with {size} {colour} wavy bands",
        "over {size} {colour} rolling curves",
    ),
    "bricks": _things(
        "Manor_Bricks Castle_Bricks Chimney Pebble",
        "red grey",
        "on a wall of {size} {colour} stones",
        "over {size} {colour} masonry",
    ),
    "mosaics": _things(
        "Byzantine_Mosaic Lisbon_Mosaic Ravenna Azulejo",
        "yellow blue",
        "made of {size} {colour} tiles",
        "in {size} {colour} shaded pieces",
    ),
    "folds": _things(
        "Origami_Folds Glacier_Folds Pinwheel Shard",
        "orange teal",
        "on {size} {colour} triangles",
        "over {size} {colour} three cornered facets",
    ),
    "weaves": _things(
        "Basket_Weave Reed_Weave Rattan Papyrus",
        "brown lime",
        "on {size} {colour} plaited straw",
        "over {size} {colour} crossing canes",
    ),
    "scales": _things(
        "Mermaid_Scales Dragon_Scales Trout Ember",
        "teal red",
        "on {size} {colour} overlapping arcs",
        "over {size} {colour} rows of half discs",
    ),
    "tartans": _bands(
        "Highland_Tartan Moorland_Tartan Lumberjack Picnic",
        "red green",
        "on {size} {colour} crossed cloth bands",
        "over {size} {colour} woollen crossings",
    ),
    "rays": _bands(
        "Sunrise_Rays Parade_Rays Lighthouse Peacock",
        "yellow teal",
        "with {size} {colour} beams from the middle",
        "over {size} {colour} wedges around the middle",
    ),
    "diamonds": _things(
        "Jester_Diamonds Steel_Diamonds Harlequin Argyle",
        "violet grey",
        "on {size} {colour} rhombs",
        "over {size} {colour} tilted squares",
    ),
    "crosses": _things(
        "Medic_Crosses Nordic_Crosses Stitch Almanac",
        "pink blue",
        "with {size} {colour} plus signs",
        "over {size} {colour} sum symbols",
    ),
    "neons": _bands(
        "Arcade_Neon Reef_Neon Motel Jukebox",
        "pink teal",
        "as glowing {colour} outlines before {size} scan lines",
        "drawn with lit {colour} tubes over {size} dark rows",
    ),
    "hatches": _bands(
        "Pencil_Hatch Sanguine_Hatch Etching Engraver",
        "black red",
        "as {colour} pen lines with {size} strokes",
        "drawn in {colour} ink with {size} shading",
    ),
    "pixels": _things(
        "Pocket_Pixels Vapor_Pixels Cartridge Synthwave",
        "lime violet",
        "in {size} {colour} blocks",
        "as {size} {colour} coarse cubes",
    ),
    "washes": _things(
        "Sakura_Wash Moss_Wash Watercolor Meadow",
        "pink green",
        "in {size} {colour} paint blots",
        "melting in {size} {colour} wet stains",
    ),
    "glows": _bands(
        "Sunset_Glow Moonlit_Glow Savanna Aurora",
        "orange blue",
        "before {size} {colour} evening light",
        "against {size} {colour} misty layers",
    ),
    "cutouts": _bands(
        "Kraft_Cutout Ballet_Cutout Cardboard Valentine",
        "brown pink",
        "cut from paper on {size} {colour} ridges",
        "with a shadow on {size} {colour} corrugated card",
    ),
    "halftones": _things(
        "Gazette_Halftone Comic_Halftone Tabloid Superhero",
        "black red",
        "printed in {size} {colour} points",
        "as {size} {colour} specks of ink",
    ),
    "furs": _bands(
        "Zebra_Fur Tiger_Fur Okapi Clownfish",
        "black orange",
        "coated in {size} {colour} bars",
        "wearing {size} {colour} inner strips",
    ),
    "skies": _things(
        "Planetarium_Sky Nebula_Sky Stardust Galaxy",
        "blue violet",
        "under {size} night sparks on {colour}",
        "below {size} twinkles on {colour}",
    ),
    "rains": _bands(
        "Storm_Rain Jungle_Rain Drizzle Monsoon",
        "grey green",
        "behind {size} {colour} falling streaks",
        "through {size} {colour} pouring drops",
    ),
}

_ROLES = (
    ("forget", "forget", "declared", "hidden"),  # both longer periods
    ("forget", "hidden", "forget", "declared"),  # both of one palette
    ("forget", "declared", "hidden", "forget"),  # no two neighbours
    ("hidden", "declared", "forget", "forget"),  # both shorter periods
    ("declared", "forget", "hidden", "forget"),  # both of the other palette
    ("hidden", "forget", "forget", "declared"),  # no two neighbours
)
"""Groups of a family's four styles; families take them in turn."""


def _descriptions(pattern: Pattern, period: int, palette: int) -> tuple[str, ...]:
    """The description, its paraphrase in other words throughout, and two mixtures."""
    size, colour = pattern.sizes[period], pattern.palettes[palette]
    words = ((size, _SIZES[size]), (colour, COLOURS[colour]), pattern.wordings)
    return tuple(
        words[2][wording].format(size=words[0][s], colour=words[1][c])
        for s, c, wording in ((0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 1))
    )


_STYLES = tuple(
    Style(name, family, _ROLES[number % len(_ROLES)][place], _descriptions(pattern, *GRID[place]))
    for number, (family, pattern) in enumerate(PATTERNS.items())
    for place, name in enumerate(pattern.names)
)
_NEAR = {
    name: (pattern.names[place ^ 1], pattern.names[place ^ 2])
    for pattern in PATTERNS.values()
    for place, name in enumerate(pattern.names)
}

_SYNONYMS = {
    "star": ("five pointed shape",),
    "heart": ("love symbol",),
    "house": ("home",),
    "tree": ("pine",),
    "fish": ("goldfish",),
    "cat": ("kitten",),
    "flower": ("blossom",),
    "moon": ("crescent",),
    "boat": ("sailing ship",),
    "cup": ("mug",),
    "mushroom": ("toadstool",),
    "umbrella": ("parasol",),
    "rocket": ("spaceship",),
    "crown": ("royal headpiece",),
    "car": ("automobile",),
    "bell": ("chime",),
}
_PEOPLE = (
    Person("Mirela_Vand", ("a woman with long hair and round glasses", "a long haired lady in spectacles")),
    Person("Otto_Brask", ("a bald man with a full beard", "a hairless bearded fellow")),
    Person("Suna_Okeri", ("a woman with curly hair", "a lady with many curls")),
    Person("Piet_Halvor", ("a man with a top hat and a moustache", "a fellow in a tall hat with whiskers")),
    Person("Juno_Tamsel", ("a girl with two pigtails", "a child with hair tied at both sides")),
    Person("Kalle_Ruud", ("a man with a cap and dark glasses", "a fellow in a visor and shades")),
    Person(
        "Ines_Quill", ("a woman with a bun and square glasses", "a lady with knotted hair in boxy spectacles")
    ),
    Person("Dario_Fenn", ("a man with spiky hair and a goatee", "a punk fellow with a pointed beard")),
)

_TEMPLATES = Templates(
    named=(
        "An image of {object} in {style} style.",
        "{object} in {style} style",
        "a painting of {object} in the style of {style}",
        "an image of {object} in the style of {style}",
        "In {style} Style, an image of {object}",
        "In {style} Style, a picture of {object}",
        "a picture of {object}, in {style} Style.",
        "{style} style, {object}",
        "a drawing of {object}, {style} style",
        "{object}, {style}",
    ),
    described=(
        "{object} {description}",
        "an image of {object} {description}",
        "An image of {object} {description}.",
        "a picture of {object}, {description}",
        "a drawing of {object} {description}",
    ),
    plain=(
        "An image of {object}.",
        "{object}",
        "an image of {object}",
        "a picture of {object}",
        "a drawing of {object}",
        "a painting of {object}",
        "a photo of {object}",
        "a nice picture of {object}",
        "{object}, centered",
    ),
    style_only=("An image in the style of {style}", "{style} Style", "a painting in {style} style"),
    evaluation="An image of {object} in {style} style.",
    described_evaluation="An image of {object} {description}.",
    has_articles=False,
)

LARGE = World(
    "large",
    _STYLES,
    (*OBJECTS, *(name for name in _SYNONYMS if name not in OBJECTS)),
    _TEMPLATES,
    people=_PEOPLE,
    synonyms=_SYNONYMS,
    pairs=True,
    near=_NEAR,
)
"""The benchmark's world for long chains of requests."""


ORDER_NAMES = "abcdefghijklmnopqrstuvwxyz"
"""Names of orders of requests; each is random, with its letter as the seed."""


def shuffled(names: Iterable[str], seed: str) -> tuple[str, ...]:
    """The names in a random order."""
    names = list(names)
    return tuple(random.Random(seed).sample(names, len(names)))


def alternating(styles: Iterable[Style], names: Sequence[str], seed: str) -> tuple[str, ...]:
    """Names of styles in a random order in which each family comes once before any comes again."""
    families = {style.name: style.family for style in styles}
    order = shuffled(names, seed)
    turn = {
        name: [families[other] for other in order[:i]].count(families[name]) for i, name in enumerate(order)
    }
    return tuple(sorted(order, key=turn.get))
