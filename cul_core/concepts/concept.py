"""Concepts: what is forgotten, the anchor it becomes, and the prompts that name both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..base.config import Config
from ..base.errors import ConceptError, brief_repr
from .cleaning import clean_text

KINDS = ("style", "object", "celebrity", "character", "memorized")
SUGGESTED_ANCHORS = {"celebrity": "person", "character": "person"}
"""Kind -> default anchor. A style needs no anchor; no word is an anchor for all objects."""

TARGET_TEMPLATES = {
    "style": "An image in the style of {name}",
    "object": "An image of a {name}",
    "celebrity": "An image of {name}",
    "character": "An image of {name}",
    "memorized": "{name}",
}
"""Kind -> prompt that names the target alone (CUIG, auxiliary prompts); a memorized image's name is its
caption."""

LONGEST_NAME = 1000
"""Characters of a name or caption. CLIP truncates after 75 tokens, about 300 characters."""
MOST_NAMES = 1000
"""Names in one list: few enough to compare all pairs."""
LONGEST_PROMPT = 2 * LONGEST_NAME
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line breaks, line separators, bidirectional overrides, surrogates."""


@lru_cache(maxsize=4 * MOST_NAMES)
def _as_whole_words(name: str) -> re.Pattern:
    """Pattern that matches a name, or its plural, as whole words, in any case."""
    return re.compile(rf"(?<!\w){re.escape(name)}(s|es)?(?!\w)", re.IGNORECASE)


def check_text(what: str, text: str, longest: int = LONGEST_NAME) -> None:
    """Check that `text` is a usable name or caption; `what` names it in the message.

    Raises:
        ConceptError: another type, more than `longest` characters, or an invisible control character.
    """
    if not isinstance(text, str):
        raise ConceptError(f"The {what} is {brief_repr(text)}; give text.")
    if len(text) > longest:
        raise ConceptError(
            f"The {what} {brief_repr(text[:40])}... has {len(text)} characters; give at most {longest}."
        )
    if match := _UNSEEN.search(text):
        raise ConceptError(
            f"The {what} {brief_repr(text)} holds the control character {match[0]!a}; type it anew."
        )


def check_count(what: str, items: Sequence, most: int = MOST_NAMES) -> None:
    """Raises ConceptError for a list of more than `most` items."""
    if len(items) > most:
        raise ConceptError(f"There are {len(items)} {what}; give at most {most}.")


def display_name(name: str) -> str:
    """The name as it stands in prompts: underscores become spaces, and spaces are collapsed."""
    return re.sub(r"\s+", " ", name.replace("_", " ")).strip()


@dataclass(frozen=True)
class Concept(Config):
    """A concept to forget, with the anchor it becomes, or a concept to keep.

    Args:
        target: name of the concept.
        kind: `style`, `object`, `celebrity`, `character`, or `memorized` for an image named by its caption.
        anchor: word that replaces the target (`dog` -> `animal`); for a memorized image, another caption;
            empty for a style, which becomes the same caption without the style, and for a concept to keep.

    Both are cleaned, see `clean_text`.

    Raises:
        ConceptError: the kind is unknown, the target is empty or holds the syntax of prompts, or the anchor
            equals the target.
    """

    target: str
    kind: str = "style"
    anchor: str = ""

    def __post_init__(self):
        for name in ("target", "anchor"):
            check_text(name, getattr(self, name))
            object.__setattr__(self, name, clean_text(name, getattr(self, name)))
        if self.kind not in KINDS:
            raise ConceptError(
                f"Concept kind {brief_repr(self.kind)} is unknown; choose one of {', '.join(KINDS)}."
            )
        if not display_name(self.target):
            raise ConceptError(
                f"The target is empty ({brief_repr(self.target)}); type the name of what should be forgotten."
            )
        if display_name(self.anchor).lower() == display_name(self.target).lower():
            raise ConceptError(
                f"Anchor and target are both {brief_repr(self.target)}; choose an anchor that differs from "
                "the target."
            )

    @property
    def name(self) -> str:
        """The target as it stands in prompts; a memorized image's caption is left as typed."""
        return self.target.strip() if self.kind == "memorized" else display_name(self.target)

    @property
    def prompt(self) -> str:
        """The prompt that names the target alone."""
        return TARGET_TEMPLATES[self.kind].format(name=self.name)

    def check_forgettable(self) -> None:
        """Raises ConceptError if the concept cannot be forgotten: every kind but a style needs an anchor."""
        if self.kind != "style" and not display_name(self.anchor):
            remedies = {"memorized": "a caption that says the same and does not reproduce the image"}
            remedy = remedies.get(self.kind, "the word it should become, such as 'horse' for 'dog'")
            raise ConceptError(
                f"Concept {brief_repr(self.target)} of kind {self.kind!r} has no anchor; give {remedy}."
            )

    def in_the_place_of(self, anchor: str) -> Concept:
        """A copy that may replace `anchor` in prompts; self if it already has an anchor or equals it."""
        return self if self.anchor or self.name.lower() == anchor.lower() else replace(self, anchor=anchor)

    def mentioned_in(self, prompt: str) -> bool:
        """Whether `prompt` contains the target as whole words, also in the plural."""
        return _as_whole_words(display_name(self.target)).search(display_name(prompt)) is not None

    def target_prompts(self, anchor_prompt: str) -> tuple[str, ...]:
        """Target prompts that an anchor prompt is rewritten to; empty if it does not contain the anchor.

        The rules are those of Concept Ablation (Kumari et al., ICCV 2023). A style is put before or after the
        caption. A memorized image has its own caption, whatever the anchor prompt is. For other kinds the
        target replaces the anchor as a whole word, also in the plural.
        """
        if self.kind == "memorized":
            return (self.name,)
        if self.kind == "style":
            body = anchor_prompt.replace(".", "").strip()
            return (
                f"In {self.name} Style, {anchor_prompt[:1].lower()}{anchor_prompt[1:]}",
                f"{body}, in {self.name} Style.",
            )
        if not display_name(self.anchor):
            return ()
        pattern = _as_whole_words(display_name(self.anchor))
        if not pattern.search(anchor_prompt):
            return ()
        return (pattern.sub(lambda match: self.name + (match.group(1) or ""), anchor_prompt),)
