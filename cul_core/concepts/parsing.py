"""What is to be forgotten and what it becomes, and the prompts that say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..base.errors import ConceptError, brief_repr
from .concept import KINDS, SUGGESTED_ANCHORS, Concept, check_count


@dataclass(frozen=True)
class ConceptList:
    """What one request forgets together, and what is declared as to be kept meanwhile."""

    targets: tuple[Concept, ...]
    keep: tuple[Concept, ...] = ()

    def __add__(self, other: ConceptList) -> ConceptList:
        names = {concept.name.lower() for concept in (*self.targets, *other.targets)}
        keep = dict.fromkeys(
            concept for concept in (*self.keep, *other.keep) if concept.name.lower() not in names
        )
        return ConceptList(tuple(dict.fromkeys((*self.targets, *other.targets))), tuple(keep))


def parse_concept(text: str, kind: str = "style", anchor: str = "") -> Concept:
    """A concept as users type it: `[kind:] target [-> anchor]`, such as `object: dog -> horse`.

    Args:
        text: what was typed.
        kind: what it is if the text does not say.
        anchor: what it becomes if the text does not say; if empty, what `SUGGESTED_ANCHORS` has for the kind.

    Raises:
        ConceptError: see `Concept`.
    """
    said, colon, rest = text.partition(":")
    if colon and said.strip().lower() in KINDS:
        kind, text = said.strip().lower(), rest
    target, _, becomes = text.partition("->")
    return Concept(target.strip(), kind, becomes.strip() or anchor.strip() or SUGGESTED_ANCHORS.get(kind, ""))


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))


def parse_keep(text: str, kind: str = "style") -> tuple[Concept, ...]:
    """Concepts to be kept, separated by commas or line breaks; one of another kind says so (`object:
    cat`)."""
    names = [name for line in _lines(text) for name in line.split(",") if name.strip()]
    check_count("names to keep", names)
    return tuple(
        dict.fromkeys(
            Concept(concept.target, concept.kind) for concept in (parse_concept(name, kind) for name in names)
        )
    )


def parse_requests(text: str, kind: str = "style", anchor: str = "") -> list[tuple[Concept, ...]]:
    """One request per line, as `parse_concept` reads it; ` + ` joins concepts that are forgotten together;
    `#` starts a comment line.

    Raises:
        ConceptError: no line names a concept, or see `Concept`.
    """
    lines = [re.split(r"\s\+\s", line) for line in _lines(text)]
    check_count("names to forget", [name for names in lines for name in names])
    requests = [tuple(parse_concept(name, kind, anchor) for name in names) for names in lines]
    if not requests:
        raise ConceptError(f"The list of requests is empty ({brief_repr(text)}); type one concept per line.")
    return requests
