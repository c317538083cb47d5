"""What the text encoder reads of a request's prompts: tokens, up to its length, not the text as typed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ..base.errors import ConceptError, brief_repr
from ..concepts.concept import Concept
from ..models.network import Network


class SeenTokens:
    """The tokens that a network reads of prompts, which can be compared.

    Args:
        network: whose tokenizer and length count.
    """

    def __init__(self, network: Network):
        self.of = cache(network.tokens)

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is so long that its end is not read."""
        prompt = prompt.strip()
        is_full = self.of(f"{prompt} {prompt}") == self.of(prompt)
        return bool(prompt) and is_full and self.of(prompt[:-1]) == self.of(prompt)


def check_anchors(seen: SeenTokens, concepts: Sequence[Concept], prompts: Sequence[str]) -> list[str]:
    """Sentences about prompts that train nothing, or of which the end is not read.

    Args:
        seen: of the network.
        concepts: targets of the request.
        prompts: its anchor prompts.

    Raises:
        ConceptError: the network reads the same tokens for a target as for its anchor in every prompt.
    """
    said, every = [], dict.fromkeys(prompts)
    for concept in concepts:
        pairs = [
            (target, concept.anchor if concept.kind == "memorized" else prompt)
            for prompt in dict.fromkeys(prompts)
            for target in concept.target_prompts(prompt)
        ]
        pairs = list(dict.fromkeys(pairs))
        every |= dict.fromkeys(prompt for pair in pairs for prompt in pair)
        same = [pair for pair in pairs if seen.of(pair[0]) == seen.of(pair[1])]
        if same and len(same) == len(pairs):
            is_cut = any(map(seen.is_cut, same[0]))
            reason = (
                "which differ only behind the last token that it reads; shorten them"
                if is_cut
                else "so that nothing would change; choose another anchor"
            )
            raise ConceptError(
                f"The model reads the same tokens in {brief_repr(same[0][0])} and {brief_repr(same[0][1])}, "
                f"{reason}."
            )
        if same:
            said.append(
                f"{len(same)} of {len(pairs)} captions train nothing, because the model reads the same "
                f"tokens in {brief_repr(same[0][0])} and {brief_repr(same[0][1])}."
            )
    if cut := [prompt for prompt in every if seen.is_cut(prompt)]:
        said.append(
            f"{len(cut)} of {len(every)} captions are longer than the text encoder reads, and their ends "
            f"are not trained: {brief_repr(cut[0])}."
        )
    return said


def without_targets(
    seen: SeenTokens, retain: Sequence[Concept], concepts: Sequence[Concept]
) -> tuple[Concept, ...]:
    """The concepts to retain of which the network does not read the same tokens as of a target."""
    targets = {seen.of(concept.name) for concept in concepts}
    return tuple(concept for concept in retain if seen.of(concept.name) not in targets)
