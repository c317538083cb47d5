"""What a forgetting method is, and what the loop hands to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..concepts.concept import Concept
from ..models.diffusers_network import DiffusersNetwork
from ..models.noise_process import NoiseSchedule
from ..models.sampling import SamplerConfig
from .training_config import TrainingConfig


@dataclass(frozen=True)
class StepContext:
    """Everything of one step that methods and regularizers may read.

    Args:
        network: the frozen model; its UNet holds W0 outside `student` and `teacher` calls.
        concepts: what this step forgets.
        retain: concepts declared as to be kept.
        previous: concepts forgotten by earlier steps.
        anchor_prompts: prompts whose pictures stay as they are, one per anchor latent.
        anchor_latents: (n, c, h, w) latents made by W0 from `anchor_prompts`; n is 0 if no part of the step
            needs them.
        pretrained: W0 of the trained group, name -> tensor: in fp32, exactly as in the file. On the CPU if
            the device's memory is short.
        start: W_{k-1} of the trained group, there too.
        training: how this step trains.
        generator: purpose, and any further words or numbers -> a CPU generator derived from the seed.
        schedule: the model's noise schedule.
        origin: identifies the model that the step begins from together with the method, for caches of what
            depends on both.
        check: raises Cancelled when the caller wants to stop; long preparations call it in between.
        anchor_sampler: how pictures to train on are sampled.
    """

    network: DiffusersNetwork
    concepts: tuple[Concept, ...]
    retain: tuple[Concept, ...]
    previous: tuple[Concept, ...]
    anchor_prompts: tuple[str, ...]
    anchor_latents: Tensor
    pretrained: dict[str, Tensor]
    start: dict[str, Tensor]
    training: TrainingConfig
    generator: Callable[..., torch.Generator]
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    origin: str = ""
    check: Callable[[], None] = lambda: None
    anchor_sampler: SamplerConfig = SamplerConfig()
