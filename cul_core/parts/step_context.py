"""What the loop hands to methods and regularizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base.last_result import LastResult
from ..concepts.concept import Concept
from ..models.network import Network
from ..models.sampling import SamplerConfig
from .training_config import TrainingConfig


@dataclass(frozen=True)
class StepContext:
    """Everything of one step that methods and regularizers may read.

    Args:
        network: the frozen model; it holds W0 outside `student` and `teacher` calls.
        concepts: what this step forgets.
        retain: concepts declared as to be kept.
        previous: concepts forgotten by earlier steps.
        anchor_prompts: prompts whose pictures stay as they are, one per anchor latent.
        anchor_latents: (n, c, h, w) latents made by W0 from `anchor_prompts`; n is 0 if no part of the step
            needs them.
        pretrained: W0 of the trained group, checkpoint key -> tensor: in fp32, exactly as in the file. On the
            CPU if the device's memory is short.
        start: W_{k-1} of the trained group, there too.
        training: how this step trains.
        generator: purpose, and any further words or numbers -> a CPU generator derived from the seed.
        origin: identifies the model that the step begins from together with the method, for caches of what
            depends on both.
        check: raises Cancelled when the caller wants to stop; long preparations call it in between.
        anchor_sampler: how images to train on are sampled.
        last_result: cache of what a part computed for an earlier step, such as importance scores.
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

    @property
    def text_readers(self) -> frozenset[str]:
        """Checkpoint keys of the weights that read text rows."""
        return frozenset(self.network.weights("text_readers"))
