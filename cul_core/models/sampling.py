"""Sampling: classifier-free guidance and one solver loop for every family and caller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.config import Config, setting
from .network import Network
from .noise_process import Solver
from .text_conditioning import Conditioning

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents (b, c, h, w), times (b,) or (), conditioning of b prompts) -> raw prediction (b, c, h, w)."""


@dataclass(frozen=True)
class SamplerConfig(Config):
    """Settings of sampling images."""

    steps: int = setting(12, "DPM-Solver++ steps.", minimum=1, maximum=1000)
    guidance_scale: float = setting(4.0, "Classifier-free guidance; 1 is none.", minimum=1.0)


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """CPU generator for one purpose, such as one image; it depends on seed and purpose alone."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))


def combine(null: Tensor, prompted: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance f(null) + s (f(c) - f(null)) (Ho and Salimans, arXiv 2207.12598)."""
    return null + guidance_scale * (prompted - null)


def predict_guided(
    predict: Predict,
    latents: Tensor,
    time: Tensor,
    conditioning: Conditioning,
    null: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """Guided prediction (b, c, h, w); at scale 1 only the conditional prediction is computed.

    Args:
        predict: the model, called once.
        latents: noised latents (b, c, h, w).
        time: () on any device.
        conditioning: encoded prompts, a batch of b.
        null: encoded empty prompt, a batch of 1.
        guidance_scale: s of `combine`.
    """
    count, time = len(latents), time.to(latents.device)
    if guidance_scale == 1:
        return predict(latents, time, conditioning)
    both = Conditioning.cat([null.expand(count), conditioning])
    return combine(*predict(torch.cat([latents, latents]), time, both).chunk(2), guidance_scale)


@torch.no_grad()
def run_solver(
    predict: Predict,
    noise: Tensor,
    solver: Solver,
    conditioning: Conditioning,
    null: Conditioning,
    guidance_scale: float,
    on_state: Callable[[Tensor, Tensor], None] = lambda latents, time: None,
) -> Tensor:
    """Latents (b, c, h, w) that a solver samples from noise (b, c, h, w).

    Args:
        predict: the model.
        noise: standard normal, on the model's device.
        solver: a fresh solver.
        conditioning: encoded prompts, a batch of b.
        null: encoded empty prompt, a batch of 1.
        guidance_scale: classifier-free guidance; 1 is none.
        on_state: called with the latents and the time at which each step starts.
    """
    latents = noise
    for time in solver.times:
        on_state(latents, time)
        prediction = predict_guided(predict, latents, time, conditioning, null, guidance_scale)
        latents = solver.step(prediction, time, latents)
    return latents


@torch.no_grad()
def sample_latents(
    network: Network,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    sampler: SamplerConfig,
    on_batch: Callable[[int], None] = lambda count: None,
    batch_size: int | None = None,
    batches: list[Tensor] | None = None,
    keeps_text_encoders: bool = True,
) -> Tensor:
    """Sampled latents (n, c, h, w) on the CPU for n prompts.

    Every batch has the same size (the last one is padded and cut), so that an image does not depend on the
    other images of its batch.

    Args:
        network: the model.
        prompts: n prompts.
        generators: one generator for the noise of each image.
        sampler: steps and guidance.
        on_batch: called after each batch with the number of images sampled so far; may raise to stop.
        batch_size: images per batch; the family's if None.
        batches: latents that an earlier call sampled, in whole batches of this size; new batches are
            appended.
        keeps_text_encoders: whether the text encoders stay in memory while sampling.
    """
    device, family = network.device, network.family
    batch_size = batch_size or family.sampling_batch
    noise = torch.stack([torch.randn(family.latent_shape, generator=generator) for generator in generators])
    contexts, null = network.encode(prompts), network.encode([""])
    if not keeps_text_encoders:
        network.free_text_encoders()
    batches = [] if batches is None else batches
    for start in range(sum(map(len, batches)), len(prompts), batch_size):
        index = torch.arange(start, start + batch_size).clamp(max=len(prompts) - 1)
        solver = network.process.sampler(sampler.steps)
        latents = run_solver(
            network.predict, noise[index].to(device), solver, contexts[index], null, sampler.guidance_scale
        )
        batches.append(latents[: len(prompts) - start].cpu())
        on_batch(min(start + batch_size, len(prompts)))
    return torch.cat(batches)
