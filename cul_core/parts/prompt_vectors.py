"""Text rows of prompts, the mean embedding of a target, and decoy concepts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..concepts.concept import Concept, display_name
from ..models.network import Network

ROWS = ("mean", "last", "content", "all")


def prompt_rows(network: Network, prompts: Sequence[str], rows: str, name: str | None = None) -> Tensor:
    """Text rows (n, d) of prompts as text readers get them.

    They are in fp64 on the CPU: some devices have no fp64, and most are slow at it.

    Args:
        network: the model.
        prompts: the prompts.
        rows: `mean` averages a prompt's content tokens, `last` takes the last content token, `content` takes
            all content tokens and EOS, `all` takes every row except the shared ones.
        name: with `mean`, only the tokens of this name are averaged; every prompt ends with it.
    """
    text = network.rows_read(network.encode(prompts).text).cpu().double()
    spans = [network.content(prompt) for prompt in prompts]
    if rows == "all":
        return text[:, network.shared_rows :].flatten(0, 1)
    if rows == "content":
        return torch.cat([e[span.start : span.stop + 1] for e, span in zip(text, spans, strict=True)])
    ends = [max(span.stop, span.start + 1) for span in spans]  # EOS for an empty prompt
    if rows == "last":
        return torch.stack([e[end - 1] for e, end in zip(text, ends, strict=True)])
    length = network.token_count(name) if name else 0
    starts = [span.stop - length if length else span.start for span in spans]
    return torch.stack([e[a:b].mean(0) for e, a, b in zip(text, starts, ends, strict=True)])


def target_vector(network: Network, concept: Concept) -> Tensor:
    """Mean text row (d,) of the target's own tokens in `Concept.prompt` (CUIG, auxiliary prompts), in fp64 on
    the CPU."""
    return prompt_rows(network, [concept.prompt], "mean", concept.name)[0]


def decoy_concepts(
    network: Network, concepts: Iterable[Concept], count: int, generator: torch.Generator
) -> list[Concept]:
    """Decoy concepts of the first target's kind, named by one to three random vocabulary words.

    Decoys stand for all unlisted names: protecting the model's response to other names, in the very prompts
    that are trained, needs no list of concepts to keep.

    Args:
        network: model whose vocabulary gives the words.
        concepts: targets, whose words no decoy contains.
        count: number of decoys.
        generator: CPU generator of the names.
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
