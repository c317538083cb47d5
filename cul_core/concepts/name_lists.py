"""Auxiliary names to keep: built-in lists of styles, objects, public figures and scenes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

from ..base.errors import ConceptError
from .concept import Concept, check_count
from .parsing import parse_keep

LISTS = {"styles": "style", "objects": "object", "public_figures": "celebrity", "scenes": "object"}
"""Name of a list, a text file in `lists` -> kind of its concepts."""

SUITABLE = {
    "style": ("styles", "objects", "scenes"),
    "object": ("objects", "styles"),
    "celebrity": ("public_figures", "styles", "objects"),
    "character": ("public_figures", "styles", "objects"),
    "memorized": ("scenes", "objects", "styles"),
}
"""Kind of a target -> lists to keep with it, its own domain first.

The paper's code (arXiv 2511.07970) keeps styles and objects for objects and celebrities, no other person for
celebrities, and only captions of images in no style for styles. Scenes replace these captions here.
"""

LONGEST_NAME = 80


def parse_names(text: str, kind: str = "style") -> tuple[Concept, ...]:
    """Distinct concepts of a list of names, separated by commas or line breaks; `#` starts a comment line.

    Raises:
        ConceptError: a name is invalid or longer than `LONGEST_NAME` (the message has the line's number), or
            there are too many names.
    """
    names: dict[Concept, None] = {}
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
        names |= dict.fromkeys(concepts)
        check_count("auxiliary names", names)
    return tuple(names)


def listed_names(choice: str, kinds: Iterable[str]) -> tuple[Concept, ...]:
    """Concepts of a built-in list.

    Args:
        choice: name of a list, `none`, or `auto` for all lists in `SUITABLE`, one name of each in turn.
        kinds: kinds of the targets, which `auto` looks up.
    """
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
