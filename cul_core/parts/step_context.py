"""`StepContext`: everything about a step that methods and regularizers may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..base.config import Config
from ..base.last_result import LastResult
from ..concepts.concept import Concept
from ..models.network import Network
from ..models.sampling import SamplerConfig
from .training_config import TrainingConfig


class TextSums(Protocol):
    """Keeps sums over encoded text between runs."""

    def __call__(
        self, key: str, make: Callable[[], Mapping[str, Tensor]], check: Callable[[], None]
    ) -> Mapping[str, Tensor]:
        """The tensors kept under `key`, or those that `make` gives, on the CPU.

        Args:
            key: hash of everything that determines the tensors.
            make: makes them.
            check: called while another process makes them; raises Cancelled to stop.
        """


def made_anew(
    key: str, make: Callable[[], Mapping[str, Tensor]], check: Callable[[], None]
) -> Mapping[str, Tensor]:
    """`TextSums` that keeps nothing."""
    return make()


@dataclass(frozen=True)
class SolvedRequest:
    """What a closed-form method that solves a whole chain needs of one request.

    Args:
        concepts: targets.
        retain: concepts to keep.
        anchor_prompts: captions that must not change.
        method: config of the method.
    """

    concepts: tuple[Concept, ...]
    retain: tuple[Concept, ...]
    anchor_prompts: tuple[str, ...]
    method: Config


@dataclass(frozen=True)
class SolvedSet:
    """The requests of a chain that are solved anew together: the earlier ones, and this step's.

    Args:
        earlier: requests of earlier steps, in their order.
        own: request of this step; None while one is taken back.
        is_all: whether the edits of the step's start come from `earlier` alone.
    """

    earlier: tuple[SolvedRequest, ...] = ()
    own: SolvedRequest | None = None
    is_all: bool = True


@dataclass(frozen=True)
class StepContext:
    """Inputs of one step, for methods and regularizers.

    Args:
        network: the frozen model; it holds W0 outside `student` and `teacher` calls.
        concepts: target concepts of this step.
        retain: concepts to keep.
        previous: concepts forgotten by earlier steps.
        anchor_prompts: captions of images that must not change, one per anchor latent.
        anchor_latents: latents (n, c, h, w) that W0 sampled from `anchor_prompts`; n is 0 if no part of the
            step needs them.
        pretrained: checkpoint key -> W0 of the trained group, in fp32, exactly as in the file; on the CPU if
            the device's memory is short.
        start: checkpoint key -> W_{k-1} of the trained group, in fp32, on the same device as `pretrained`.
        training: training settings of this step.
        generator: (purpose, further words or numbers) -> CPU generator derived from the seed.
        origin: key of the model that the step starts from and the method, for caches that depend on both.
        check: raises Cancelled if the caller wants to stop; long preparations call it regularly.
        anchor_sampler: sampling settings of the images to train on.
        last_result: cache of a part's result from an earlier step, such as importance scores.
        source: content hash of the pretrained weights, for caches that depend on nothing else.
        solved: requests that a closed-form method solves together.
        say: called with what is being done, such as 'reading sentence 64 of 1200'.
        text_sums: keeps sums over encoded text between runs.
    """

    network: Network
    concepts: tuple[Concept, ...]
    retain: tuple[Concept, ...]
    previous: tuple[Concept, ...]
    anchor_prompts: tuple[str, ...]
    anchor_latents: Tensor
    pretrained: dict[str, Tensor]
    start: dict[str, Tensor]
    training: TrainingConfig
    generator: Callable[..., torch.Generator]
    origin: str = ""
    check: Callable[[], None] = lambda: None
    anchor_sampler: SamplerConfig = SamplerConfig()
    last_result: LastResult = field(default_factory=LastResult)
    source: str = ""
    solved: SolvedSet = SolvedSet()
    say: Callable[[str], None] = lambda text: None
    text_sums: TextSums = made_anew

    @property
    def text_readers(self) -> frozenset[str]:
        """Checkpoint keys of the text readers, the weights whose inputs are text rows."""
        return frozenset(self.network.weights("text_readers"))
