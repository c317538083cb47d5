"""Sampling: one guided prediction and one loop for every family, solver and caller."""

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
    """How images are sampled."""

    steps: int = setting(12, "DPM-Solver++ steps.", minimum=1, maximum=1000)
    guidance_scale: float = setting(4.0, "Classifier-free guidance; 1 is none.", minimum=1.0)


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, such as one image, so that any subset of work repeats on its own."""
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
    """The guided prediction (b, c, h, w); a scale of 1 asks for the prompted half alone.

    Args:
        predict: the model, called once.
        latents: (b, c, h, w).
        time: (), on any device.
        conditioning: of b prompts.
        null: of the empty prompt, once.
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
    """Latents (b, c, h, w) from noise (b, c, h, w); `on_state(latents, time)` sees what each step starts
    from."""
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
    on_batch: Callable[[int], None] = lambda done: None,
    batch_size: int | None = None,
    batches: list[Tensor] | None = None,
    keeps_text_encoders: bool = True,
) -> Tensor:
    """Latents (n, c, h, w) on the CPU for n prompts, each from its own generator.

    Every batch has the same size (the last is filled up and cut), so that an image is the same in any
    company.

    Args:
        network: the model.
        prompts: n of them.
        generators: one for the noise of each image.
        sampler: steps and guidance.
        on_batch: called with the number of images done after each batch; may raise to stop.
        batch_size: images at a time; the family's if it is not given.
        batches: latents that an earlier call has sampled, in whole batches of this size; new ones are
            appended.
        keeps_text_encoders: whether the text encoders stay in memory meanwhile.
    """
    device, family = network.device, network.family
    batch_size = batch_size or family.sampling_batch
    noise = torch.stack([torch.randn(family.latent_shape, generator=generator) for generator in generators])
    contexts, null = network.encode(prompts), network.encode([""])
    if not keeps_text_encoders:
        network.free_text_encoders()
    done = [] if batches is None else batches
    for start in range(sum(map(len, done)), len(prompts), batch_size):
        index = torch.arange(start, start + batch_size).clamp(max=len(prompts) - 1)
        solver = network.process.sampler(sampler.steps)
        latents = run_solver(
            network.predict, noise[index].to(device), solver, contexts[index], null, sampler.guidance_scale
        )
        done.append(latents[: len(prompts) - start].cpu())
        on_batch(min(start + batch_size, len(prompts)))
    return torch.cat(done)
