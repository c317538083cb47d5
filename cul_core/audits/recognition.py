"""Whether images show a concept, by the pretrained model's own predictions: no classifier is needed.

After Li et al., Your Diffusion Model is Secretly a Zero-Shot Classifier, ICCV 2023, arXiv 2303.16203.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from .changes import declared_concepts, domain_names, neighbours, without
from .probes import Probes, images_of

_STATES = 12
_RIVALS = 4


@dataclass(frozen=True)
class Recognizer:
    """Tells whether images show a concept: whether its prompt predicts them best, among those of its rivals.

    Args:
        concept: the concept.
        rivals: prompts that compete with the concept's: those of its nearest neighbours, and the empty one.
        seed: of the noise.
    """

    concept: Concept
    rivals: tuple[str, ...]
    seed: int

    @classmethod
    def of(
        cls,
        network: Network,
        model: UnlearnModel,
        concept: Concept,
        seed: int,
        check: Callable[[], None] = lambda: None,
    ) -> Recognizer:
        """The recognizer of a concept, for a network with its pretrained weights."""
        probes = Probes.of(network, images_of(network, concept, 2, seed), 4, seed, concept.name)
        among = [*declared_concepts(model), *domain_names(network, concept.kind)]
        among = [other for other in without(dict.fromkeys(among), [concept]) if other.kind == concept.kind]
        near = neighbours(network, probes, concept, among, _RIVALS, check)
        anchor = [Concept(concept.anchor, concept.kind)] if concept.anchor else []
        rivals = dict.fromkeys(["", *(other.prompt for other in (*anchor, *near))])
        return cls(concept, tuple(rivals), seed)

    def shown(
        self, network: Network, latents: Tensor, check: Callable[[], None] = lambda: None
    ) -> list[bool]:
        """Whether each of the images with latents (n, c, h, w) shows the concept; the network must have its
        pretrained weights."""
        probes = Probes.of(network, latents, _STATES, self.seed, "recognition")
        own, others = probes.errors(network, self.concept.prompt), []
        for prompt in self.rivals:
            check()
            others.append(probes.errors(network, prompt))
        return (own < torch.stack(others).amin(0)).tolist()
