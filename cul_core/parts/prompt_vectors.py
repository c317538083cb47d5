"""Prompts as vectors: rows of text embeddings, the direction of a target, and decoy prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..concepts.concept import Concept, display_name
from ..models.diffusers_network import DiffusersNetwork

ROWS = ("mean", "last", "content", "all")


def prompt_rows(
    network: DiffusersNetwork, prompts: Sequence[str], rows: str, name: str | None = None
) -> Tensor:
    """Embedding rows (n, d) of prompts, in fp64.

    `mean` averages the content tokens (those of `name` alone if it is given), `last` takes the last content
    token, `content` takes every content token and the end token, `all` every position but the first, which is
    the same for every prompt.
    """
    embeddings = network.encode(prompts).text.double()
    counts = [network.token_count(prompt) for prompt in prompts]
    if rows == "all":
        return embeddings[:, 1:].flatten(0, 1)
    if rows == "content":
        return torch.cat([e[1 : n + 2] for e, n in zip(embeddings, counts, strict=True)])
    if rows == "last":
        return torch.stack([e[max(n, 1)] for e, n in zip(embeddings, counts, strict=True)])
    length = network.token_count(name) if name else 0
    return torch.stack(
        [
            e[1 + n - length if length else 1 : max(n, 1) + 1].mean(0)
            for e, n in zip(embeddings, counts, strict=True)
        ]
    )


def target_vector(network: DiffusersNetwork, concept: Concept) -> Tensor:
    """Mean embedding (d,) of the target's own tokens in the prompt that names it alone, in fp64 (CUIG,
    auxiliary prompts)."""
    return prompt_rows(network, [concept.prompt], "mean", concept.name)[0]


def vocabulary_words(tokenizer: object, least_letters: int = 3) -> list[str]:
    """Whole words the tokenizer knows as one token, in id order."""
    ending = re.compile(rf"[a-z]{{{least_letters},}}</w>")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [token.removesuffix("</w>") for token, _ in vocabulary if ending.fullmatch(token)]


def decoy_concepts(
    network: DiffusersNetwork, concepts: Iterable[Concept], count: int, generator: torch.Generator
) -> list[Concept]:
    """`count` made-up concepts of the first target's kind, named by random vocabulary words that no target
    contains.

    They stand for everything nobody thought of listing: protecting what the model makes of `any other name`
    in the very sentences that are trained needs no list of what to keep.
    """
    concepts = list(concepts)
    taken = {word for concept in concepts for word in re.findall(r"[a-z]+", concept.name.lower())}
    anchor = display_name(concepts[0].anchor).lower()
    words = [word for word in vocabulary_words(network.tokenizer) if word not in taken]
    decoys = []
    while len(decoys) < count:
        length = 1 + int(torch.randint(3, (), generator=generator))
        picks = torch.randint(len(words), (length,), generator=generator).tolist()
        name = " ".join(words[i] for i in picks)
        if name != anchor:
            decoys.append(Concept(name, concepts[0].kind, concepts[0].anchor))
    return decoys
