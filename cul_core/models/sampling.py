"""Noise schedule and sampling shared by every family: add noise, convert predictions, sample with
guidance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.config import Config, setting
from .diffusers_network import DiffusersNetwork
from .noise_process import NoiseSchedule
from .text_conditioning import Conditioning

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents (b, c, h, w), timesteps (b,), embeddings of b prompts) -> raw UNet output (b, c, h, w)."""


@dataclass(frozen=True)
class SamplerConfig(Config):
    """How pictures are sampled."""

    steps: int = setting(12, "DPM-Solver++ steps.", minimum=1, maximum=1000)
    guidance_scale: float = setting(4.0, "Classifier-free guidance; 1 is none.", minimum=1.0)


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, such as one picture, so that any subset of work repeats on its own."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))


@torch.no_grad()
def sample_latents(
    network: DiffusersNetwork,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    sampler: SamplerConfig,
    on_batch: Callable[[int], None] = lambda done: None,
    batch_size: int | None = None,
    batches: list[Tensor] | None = None,
    keeps_text_encoders: bool = True,
) -> Tensor:
    """Latents (n, c, h, w) on the CPU for n prompts, each from its own generator.

    Every batch has the same size (the last is filled up and cut), so that a picture is the same in any
    company; the family's if `batch_size` is not given. `on_batch(done)` runs after each and may raise to
    stop. `batches` are the latents that an earlier call has sampled, in whole batches of this size; those
    sampled now are appended. Without `keeps_text_encoders` their memory is free meanwhile: sampling many
    pictures takes long, and loading the encoders again does not.
    """
    device, family = network.device, network.family
    schedule = NoiseSchedule(ends_in_noise=family.ends_in_noise)
    batch_size = batch_size or family.sampling_batch
    noise = torch.stack([torch.randn(family.latent_shape, generator=generator) for generator in generators])
    contexts, null = network.encode(prompts), network.encode([""])
    if not keeps_text_encoders:
        network.free_text_encoders()
    done = [] if batches is None else batches
    for start in range(sum(map(len, done)), len(prompts), batch_size):
        index = (torch.arange(start, start + batch_size)).clamp(max=len(prompts) - 1)
        latents = noise[index].to(device)
        context = Conditioning.cat([null.expand(batch_size), contexts[index]])
        solver = schedule.solver(family.prediction_type, sampler.steps)
        for t in solver.timesteps:
            pair = torch.cat([latents, latents])
            empty, full = network.predict(pair, t, context).chunk(2)
            latents = solver.step(empty + sampler.guidance_scale * (full - empty), t, latents).prev_sample
        done.append(latents[: len(prompts) - start].cpu())
        on_batch(min(start + batch_size, len(prompts)))
    return torch.cat(done)
