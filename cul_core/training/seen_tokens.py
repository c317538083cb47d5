"""What the text encoder reads of a request's prompts: tokens, up to its length, not the text as typed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from ..base.errors import ConceptError, brief_repr
from ..concepts.concept import Concept
from ..models.network import Network

_AT_ONCE = 16


class SeenTokens:
    """The tokens that a network reads of prompts, which can be compared.

    Args:
        network: whose tokenizer and length count.
    """

    def __init__(self, network: Network):
        self._network = network
        self._seen: dict[str, bytes] = {}
        self._length = 0

    def of(self, prompt: str) -> bytes:
        """A value that is equal for prompts of which the network reads the same tokens."""
        self.read([prompt])
        return self._seen[prompt]

    def read(self, prompts: Iterable[str]) -> None:
        """Read prompts that are asked for later, many at once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._seen]
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            rows = self._network.token_rows(part)[0].detach().float().cpu()
            self._length = rows.shape[1]
            for prompt, row in zip(part, rows, strict=True):
                self._seen[prompt] = hashlib.sha256(row.contiguous().numpy()).digest()

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is so long that its end is not read."""
        prompt, seen = prompt.strip(), self.of(prompt.strip())
        # a token is at least one byte, and two of the rows are the start's and the end's
        return len(prompt.encode()) > self._length - 2 and seen == self.of(prompt[:-1])


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
        seen.read(prompt for pair in pairs for prompt in pair)
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
