"""What is to be forgotten and what it becomes, and the prompts that say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .config import Config
from .errors import ConceptError, shown

KINDS = ("style", "object", "celebrity", "character", "memorized")
SUGGESTED_ANCHORS = {"celebrity": "person", "character": "person"}
"""What a target of each kind becomes when nobody says so. A style needs no anchor word; an object has none that suits all."""

TARGET_TEMPLATES = {
    "style": "An image in the style of {name}",
    "object": "An image of a {name}",
    "celebrity": "An image of {name}",
    "character": "An image of {name}",
    "memorized": "{name}",
}
"""Prompt by which a concept of each kind is named alone (CUIG, auxiliary prompts); a memorized picture's name is its caption."""

LONGEST_NAME = 1000
"""Letters of a name or caption. CLIP reads 75 tokens, some 300 letters, so that nothing longer differs from its beginning."""
MOST_NAMES = 1000
"""Names in one list: ten times what anybody has forgotten or kept by name, and few enough to compare each with each."""
LONGEST_PROMPT = 2 * LONGEST_NAME
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line breaks, separators of lines, overrides of the direction of writing, and halves of pairs."""


@lru_cache(maxsize=4 * MOST_NAMES)
def _as_whole_words(name: str) -> re.Pattern:
    """Finds a name, also in the plural, as whole words."""
    return re.compile(rf"(?<!\w){re.escape(name)}(s|es)?(?!\w)", re.IGNORECASE)


def check_text(what: str, text: str, longest: int = LONGEST_NAME) -> None:
    """Raises ConceptError for what is no text, is too long, or has characters that act instead of being seen."""
    if not isinstance(text, str):
        raise ConceptError(f"The {what} is {shown(text)}; give text.")
    if len(text) > longest:
        raise ConceptError(f"The {what} {shown(text[:40])}... has {len(text)} characters; give at most {longest}.")
    if found := _UNSEEN.search(text):
        raise ConceptError(f"The {what} {shown(text)} holds the control character {found[0]!a}; type it anew.")


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
        anchor: word that takes the target's place (`dog` -> `animal`), for a memorized picture another caption; for a style, and for
            a concept to be kept, empty.

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
            raise ConceptError(f"Concept kind {shown(self.kind)} is unknown; choose one of {', '.join(KINDS)}.")
        if not display_name(self.target):
            raise ConceptError(f"The target is empty ({shown(self.target)}); type the name of what should be forgotten.")
        if display_name(self.anchor).lower() == display_name(self.target).lower():
            raise ConceptError(f"Anchor and target are both {shown(self.target)}; choose an anchor that differs from the target.")

    @property
    def name(self) -> str:
        return self.target.strip() if self.kind == "memorized" else display_name(self.target)  # a caption is left as it is

    @property
    def prompt(self) -> str:
        """The prompt that names the target and nothing else."""
        return TARGET_TEMPLATES[self.kind].format(name=self.name)

    def check_forgettable(self) -> None:
        """Raises ConceptError when this can be kept but not forgotten: only a style goes without an anchor."""
        if self.kind != "style" and not display_name(self.anchor):
            becomes = {"memorized": "a caption that says the same and does not draw that picture"}
            mend = becomes.get(self.kind, "the word it should become, such as 'horse' for 'dog'")
            raise ConceptError(f"Concept {shown(self.target)} of kind {self.kind!r} has no anchor; give {mend}.")

    def in_the_place_of(self, anchor: str) -> Concept:
        """This concept where a target with that anchor stands in a prompt; itself if it has an anchor, or is what that says."""
        return self if self.anchor or self.name.lower() == anchor.lower() else replace(self, anchor=anchor)

    def mentioned_in(self, prompt: str) -> bool:
        """Whether `prompt` contains the target as whole words, also in the plural."""
        return _as_whole_words(display_name(self.target)).search(display_name(prompt)) is not None

    def target_prompts(self, anchor_prompt: str) -> tuple[str, ...]:
        """The target versions of an anchor prompt; empty when it cannot be rewritten (ConAbl's rules, Kumari et al., ICCV 2023).

        A style is put before or after the caption. A memorized picture has its own caption, whatever the anchor's is. For other kinds
        the anchor is replaced as a whole word, with its plural.
        """
        if self.kind == "memorized":
            return (self.name,)
        if self.kind == "style":
            body = anchor_prompt.replace(".", "").strip()
            return (f"In {self.name} Style, {anchor_prompt[:1].lower()}{anchor_prompt[1:]}", f"{body}, in {self.name} Style.")
        if not display_name(self.anchor):
            return ()
        pattern = _as_whole_words(display_name(self.anchor))
        if not pattern.search(anchor_prompt):
            return ()
        return (pattern.sub(lambda match: self.name + (match.group(1) or ""), anchor_prompt),)


@dataclass(frozen=True)
class ConceptList:
    """What one request forgets together, and what is declared as to be kept meanwhile."""

    targets: tuple[Concept, ...]
    keep: tuple[Concept, ...] = ()

    def __add__(self, other: ConceptList) -> ConceptList:
        names = {concept.name.lower() for concept in (*self.targets, *other.targets)}
        keep = dict.fromkeys(concept for concept in (*self.keep, *other.keep) if concept.name.lower() not in names)
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
    """Concepts to be kept, separated by commas or line breaks; one of another kind says so (`object: cat`)."""
    names = [name for line in _lines(text) for name in line.split(",") if name.strip()]
    check_count("names to keep", names)
    return tuple(dict.fromkeys(Concept(concept.target, concept.kind) for concept in (parse_concept(name, kind) for name in names)))


def parse_requests(text: str, kind: str = "style", anchor: str = "") -> list[tuple[Concept, ...]]:
    """One request per line, as `parse_concept` reads it; ` + ` joins concepts that are forgotten together; `#` starts a comment line.

    Raises:
        ConceptError: no line names a concept, or see `Concept`.
    """
    lines = [re.split(r"\s\+\s", line) for line in _lines(text)]
    check_count("names to forget", [name for names in lines for name in names])
    requests = [tuple(parse_concept(name, kind, anchor) for name in names) for names in lines]
    if not requests:
        raise ConceptError(f"The list of requests is empty ({shown(text)}); type one concept per line.")
    return requests
