"""Names to keep that nobody has to type: lists of styles, objects, public figures and scenes, and what suits
which target."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

from ..base.errors import ConceptError
from .concept import Concept, check_count
from .parsing import parse_keep

LISTS = {"styles": "style", "objects": "object", "public_figures": "celebrity", "scenes": "object"}
"""Name of a list, a text file beside this module -> kind of its concepts."""

SUITABLE = {
    "style": ("styles", "objects", "scenes"),
    "object": ("objects", "styles"),
    "celebrity": ("public_figures", "styles", "objects"),
    "character": ("public_figures", "styles", "objects"),
    "memorized": ("scenes", "objects", "styles"),
}
"""Kind of a target -> lists that suit it, its own domain first.

The paper's code (arXiv 2511.07970) keeps styles and objects for objects and celebrities, but for celebrities
no other person, and for styles only captions of pictures in no style, whose place scenes take here.
"""

LONGEST_NAME = 80


def parse_names(text: str, kind: str = "style") -> tuple[Concept, ...]:
    """Names as users and the lists have them: as on a keep list, by commas or line breaks, `#` starting a
    comment line.

    Raises:
        ConceptError: a line that holds no usable name, with its number.
    """
    found: dict[Concept, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            concepts = parse_keep(line, kind)
        except ConceptError as error:
            raise ConceptError(f"Line {number} of the auxiliary names: {error}") from error
        for concept in concepts:
            if len(concept.name) > LONGEST_NAME:
                raise ConceptError(
                    f"Line {number} of the auxiliary names: {concept.name[:30]!r}... has {len(concept.name)} "
                    f"characters; give names of at most {LONGEST_NAME}, separated by commas or line breaks."
                )
        found |= dict.fromkeys(concepts)
        check_count("auxiliary names", found)
    return tuple(found)


def listed_names(choice: str, kinds: Iterable[str]) -> tuple[Concept, ...]:
    """The names of a list; for `auto` those of every list that suits targets of these kinds, one of each in
    turn; none for `none`."""
    if choice == "none":
        return ()
    names = (
        dict.fromkeys(chain.from_iterable(SUITABLE[kind] for kind in kinds))
        if choice == "auto"
        else (choice,)
    )
    lists = [
        parse_names(
            (Path(__file__).parent / "lists" / f"{name}.txt").read_text(encoding="utf-8"), LISTS[name]
        )
        for name in names
    ]
    return tuple(concept for turn in zip_longest(*lists) for concept in turn if concept)
