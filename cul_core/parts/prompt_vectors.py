"""Prompts as vectors: text rows, the direction of a target, and decoy prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..concepts.concept import Concept, display_name
from ..models.network import Network

ROWS = ("mean", "last", "content", "all")


def prompt_rows(network: Network, prompts: Sequence[str], rows: str, name: str | None = None) -> Tensor:
    """Text rows (n, d) of prompts, in fp64 on the CPU: some devices have no fp64, and most are slow at it.

    `mean` averages the content tokens (those of `name` alone if it is given), `last` takes the last content
    token, `content` takes every content token and the one that ends the text, `all` every row but those that
    all prompts share.
    """
    text = network.encode(prompts).text.cpu().double()
    spans = [network.content(prompt) for prompt in prompts]
    if rows == "all":
        return text[:, network.shared_rows :].flatten(0, 1)
    if rows == "content":
        return torch.cat([e[span.start : span.stop + 1] for e, span in zip(text, spans, strict=True)])
    ends = [max(span.stop, span.start + 1) for span in spans]  # an empty prompt's is the row that ends it
    if rows == "last":
        return torch.stack([e[end - 1] for e, end in zip(text, ends, strict=True)])
    length = network.token_count(name) if name else 0
    starts = [span.stop - length if length else span.start for span in spans]
    return torch.stack([e[a:b].mean(0) for e, a, b in zip(text, starts, ends, strict=True)])


def target_vector(network: Network, concept: Concept) -> Tensor:
    """Mean embedding (d,) of the target's own tokens in the prompt that names it alone, in fp64 on the
    CPU (CUIG, auxiliary prompts)."""
    return prompt_rows(network, [concept.prompt], "mean", concept.name)[0]


def decoy_concepts(
    network: Network, concepts: Iterable[Concept], count: int, generator: torch.Generator
) -> list[Concept]:
    """`count` made-up concepts of the first target's kind, named by random vocabulary words that no target
    contains.

    They stand for everything nobody thought of listing: protecting what the model makes of `any other name`
    in the very sentences that are trained needs no list of what to keep.
    """
    concepts = list(concepts)
    taken = {word for concept in concepts for word in re.findall(r"[a-z]+", concept.name.lower())}
    anchor = display_name(concepts[0].anchor).lower()
    words = [word for word in network.words() if word not in taken]
    decoys = []
    while len(decoys) < count:
        length = 1 + int(torch.randint(3, (), generator=generator))
        picks = torch.randint(len(words), (length,), generator=generator).tolist()
        name = " ".join(words[i] for i in picks)
        if name != anchor:
            decoys.append(Concept(name, concepts[0].kind, concepts[0].anchor))
    return decoys
