"""Parsing of concepts, keep lists and lists of requests as users type them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..base.errors import ConceptError, brief_repr
from .cleaning import BREAKS
from .concept import KINDS, SUGGESTED_ANCHORS, Concept, check_count


@dataclass(frozen=True)
class ConceptList:
    """Concepts that one request forgets together, and retain concepts that it keeps."""

    targets: tuple[Concept, ...]
    keep: tuple[Concept, ...] = ()

    def __add__(self, other: ConceptList) -> ConceptList:
        names = {concept.name.lower() for concept in (*self.targets, *other.targets)}
        keep = dict.fromkeys(
            concept for concept in (*self.keep, *other.keep) if concept.name.lower() not in names
        )
        return ConceptList(tuple(dict.fromkeys((*self.targets, *other.targets))), tuple(keep))


def parse_concept(text: str, kind: str = "style", anchor: str = "") -> Concept:
    """The concept of a text `[kind:] target [-> anchor]`, such as `object: dog -> horse`.

    Args:
        text: text that a user typed.
        kind: kind if the text has none.
        anchor: anchor if the text has none; if empty, that of `SUGGESTED_ANCHORS` for the kind.

    Raises:
        ConceptError: see `Concept`.
    """
    prefix, colon, rest = text.lstrip(BREAKS).partition(":")
    if colon and prefix.strip().lower() in KINDS:
        kind, text = prefix.strip().lower(), rest
    target, _, own_anchor = text.partition("->")
    return Concept(
        target.strip(), kind, own_anchor.strip() or anchor.strip() or SUGGESTED_ANCHORS.get(kind, "")
    )


def _lines(text: str) -> Iterator[str]:
    lines = (line.strip().strip(BREAKS).strip() for line in text.splitlines())
    return (line for line in lines if line and not line.startswith("#"))


def parse_keep(text: str, kind: str = "style") -> tuple[Concept, ...]:
    """Retain concepts, without anchors, of a text with names separated by commas or line breaks.

    Args:
        text: the names; `#` starts a comment line, and a prefix changes the kind (`object: cat`).
        kind: kind of names without a prefix.

    Raises:
        ConceptError: a name is invalid (see `Concept`), or there are too many.
    """
    names = [name for line in _lines(text) for name in line.split(",") if name.strip()]
    check_count("names to keep", names)
    return tuple(
        dict.fromkeys(
            Concept(concept.target, concept.kind) for concept in (parse_concept(name, kind) for name in names)
        )
    )


def parse_requests(text: str, kind: str = "style", anchor: str = "") -> list[tuple[Concept, ...]]:
    """The concepts of each request in a text with one request per line.

    Args:
        text: lines of concepts in `parse_concept`'s syntax; ` + ` joins concepts that one request forgets
            together; `#` starts a comment line.
        kind: kind of concepts without one.
        anchor: anchor of concepts without one.

    Raises:
        ConceptError: no line names a concept, a concept is invalid (see `Concept`), or there are too many.
    """
    lines = [re.split(r"\s\+\s", line) for line in _lines(text)]
    check_count("names to forget", [name for names in lines for name in names])
    requests = [tuple(parse_concept(name, kind, anchor) for name in names) for names in lines]
    if not requests:
        raise ConceptError(f"The list of requests is empty ({brief_repr(text)}); type one concept per line.")
    return requests
