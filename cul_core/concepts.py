"""What is to be forgotten and what it becomes, and the prompts that say so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .config import Config
from .errors import ConceptError

KINDS = ("style", "object", "celebrity", "character")
_NEEDS_ANCHOR = ("object", "celebrity", "character")

TARGET_TEMPLATES = {
    "style": "An image in the style of {name}",
    "object": "An image of a {name}",
    "celebrity": "An image of {name}",
    "character": "An image of {name}",
}
"""Prompt by which a concept of each kind is named alone (CUIG, auxiliary prompts)."""


def display_name(name: str) -> str:
    """The name as a person would type it: underscores become spaces (file labels never reach a prompt)."""
    return re.sub(r"\s+", " ", name.replace("_", " ")).strip()


@dataclass(frozen=True)
class Concept(Config):
    """One target. A style needs no anchor word: it becomes the same caption without the style.

    Args:
        target: name of what is forgotten.
        kind: `style`, `object`, `celebrity` or `character`.
        anchor: word that takes the target's place (`dog` -> `animal`); for a style, empty.

    Raises:
        ConceptError: unknown kind, empty target, missing anchor, or an anchor equal to the target.
    """

    target: str
    kind: str = "style"
    anchor: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConceptError(f"Concept kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        if not display_name(self.target):
            raise ConceptError(f"The target is empty ({self.target!r}); type the name of what should be forgotten.")
        if self.kind in _NEEDS_ANCHOR and not display_name(self.anchor):
            raise ConceptError(f"Concept {self.target!r} of kind {self.kind!r} has no anchor; give the word it should become.")
        if display_name(self.anchor).lower() == display_name(self.target).lower():
            raise ConceptError(f"Anchor and target are both {self.target!r}; choose an anchor that differs from the target.")

    @property
    def name(self) -> str:
        return display_name(self.target)

    @property
    def prompt(self) -> str:
        """The prompt that names the target and nothing else."""
        return TARGET_TEMPLATES[self.kind].format(name=self.name)

    def mentioned_in(self, prompt: str) -> bool:
        """Whether `prompt` contains the target as whole words, also in the plural."""
        return re.search(rf"(?<!\w){re.escape(self.name)}(s|es)?(?!\w)", display_name(prompt), re.IGNORECASE) is not None

    def target_prompts(self, anchor_prompt: str) -> tuple[str, ...]:
        """The target versions of an anchor prompt; empty when it cannot be rewritten (ConAbl's rules, Kumari et al., ICCV 2023).

        A style is put before or after the caption. For other kinds the anchor is replaced as a whole word, with its plural.
        """
        if self.kind == "style":
            body = anchor_prompt.replace(".", "").strip()
            return (f"In {self.name} Style, {anchor_prompt[:1].lower()}{anchor_prompt[1:]}", f"{body}, in {self.name} Style.")
        anchor = re.escape(display_name(self.anchor))
        pattern = re.compile(rf"(?<!\w){anchor}(s|es)?(?!\w)", re.IGNORECASE)
        if not pattern.search(anchor_prompt):
            return ()
        return (pattern.sub(lambda match: self.name + (match.group(1) or ""), anchor_prompt),)
