"""What is to be forgotten and what it becomes, and the prompts that say so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..base.config import Config
from ..base.errors import ConceptError, brief_repr

KINDS = ("style", "object", "celebrity", "character", "memorized")
SUGGESTED_ANCHORS = {"celebrity": "person", "character": "person"}
"""What a target of each kind becomes when nobody says so. A style needs no anchor word; an object has none
that suits all."""

TARGET_TEMPLATES = {
    "style": "An image in the style of {name}",
    "object": "An image of a {name}",
    "celebrity": "An image of {name}",
    "character": "An image of {name}",
    "memorized": "{name}",
}
"""Prompt by which a concept of each kind is named alone (CUIG, auxiliary prompts); a memorized picture's name
is its caption."""

LONGEST_NAME = 1000
"""Letters of a name or caption. CLIP reads 75 tokens, some 300 letters, so that nothing longer differs from
its beginning."""
MOST_NAMES = 1000
"""Names in one list: ten times what anybody has forgotten or kept by name, and few enough to compare each
with each."""
LONGEST_PROMPT = 2 * LONGEST_NAME
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line breaks, separators of lines, overrides of the direction of writing, and
halves of pairs."""


@lru_cache(maxsize=4 * MOST_NAMES)
def _as_whole_words(name: str) -> re.Pattern:
    """Finds a name, also in the plural, as whole words."""
    return re.compile(rf"(?<!\w){re.escape(name)}(s|es)?(?!\w)", re.IGNORECASE)


def check_text(what: str, text: str, longest: int = LONGEST_NAME) -> None:
    """Raises ConceptError for what is no text, is too long, or has characters that act instead of being
    seen."""
    if not isinstance(text, str):
        raise ConceptError(f"The {what} is {brief_repr(text)}; give text.")
    if len(text) > longest:
        raise ConceptError(
            f"The {what} {brief_repr(text[:40])}... has {len(text)} characters; give at most {longest}."
        )
    if found := _UNSEEN.search(text):
        raise ConceptError(
            f"The {what} {brief_repr(text)} holds the control character {found[0]!a}; type it anew."
        )


def check_count(what: str, items: Sequence, most: int = MOST_NAMES) -> None:
    """Raises ConceptError for a list that is too long."""
    if len(items) > most:
        raise ConceptError(f"There are {len(items)} {what}; give at most {most}.")


def display_name(name: str) -> str:
    """The name as a person would type it: underscores become spaces (file labels never reach a prompt)."""
    return re.sub(r"\s+", " ", name.replace("_", " ")).strip()


@dataclass(frozen=True)
class Concept(Config):
    """One target. A style needs no anchor word: it becomes the same caption without the style.

    Args:
        target: name of what is forgotten.
        kind: `style`, `object`, `celebrity`, `character`, or `memorized`: a picture, called by its caption.
        anchor: word that takes the target's place (`dog` -> `animal`), for a memorized picture another
            caption; for a style, and for a concept to be kept, empty.

    Raises:
        ConceptError: unknown kind, empty target, or an anchor equal to the target.
    """

    target: str
    kind: str = "style"
    anchor: str = ""

    def __post_init__(self):
        check_text("target", self.target)
        check_text("anchor", self.anchor)
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
        # a caption is left as it is
        return self.target.strip() if self.kind == "memorized" else display_name(self.target)

    @property
    def prompt(self) -> str:
        """The prompt that names the target and nothing else."""
        return TARGET_TEMPLATES[self.kind].format(name=self.name)

    def check_forgettable(self) -> None:
        """Raises ConceptError when this can be kept but not forgotten: only a style goes without an
        anchor."""
        if self.kind != "style" and not display_name(self.anchor):
            becomes = {"memorized": "a caption that says the same and does not draw that picture"}
            mend = becomes.get(self.kind, "the word it should become, such as 'horse' for 'dog'")
            raise ConceptError(
                f"Concept {brief_repr(self.target)} of kind {self.kind!r} has no anchor; give {mend}."
            )

    def in_the_place_of(self, anchor: str) -> Concept:
        """This concept where a target with that anchor stands in a prompt; itself if it has an anchor, or is
        what that says."""
        return self if self.anchor or self.name.lower() == anchor.lower() else replace(self, anchor=anchor)

    def mentioned_in(self, prompt: str) -> bool:
        """Whether `prompt` contains the target as whole words, also in the plural."""
        return _as_whole_words(display_name(self.target)).search(display_name(prompt)) is not None

    def target_prompts(self, anchor_prompt: str) -> tuple[str, ...]:
        """The target versions of an anchor prompt; empty when it cannot be rewritten (ConAbl's rules, Kumari
        et al., ICCV 2023).

        A style is put before or after the caption. A memorized picture has its own caption, whatever the
        anchor's is. For other kinds the anchor is replaced as a whole word, with its plural.
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
