"""States on the way from noise to pictures, made by a teacher and kept for many updates, so that few
trajectories train long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sampling import Predict
from .text_conditioning import Conditioning


@dataclass(frozen=True)
class Trajectory:
    """The states of one picture.

    Args:
        prompt: number of the prompt it was sampled for.
        states: (T, c, h, w) fp16 on the CPU; state i is what step i starts from, so state 0 is noise.
        timesteps: (T,), those of the steps.
        scales: (T,) fp32; the UNet sees state x scale, which is 1 unless the scheduler counts in sigmas (then
            1 / sqrt(sigma^2 + 1)).
    """

    prompt: int
    states: Tensor
    timesteps: Tensor
    scales: Tensor


@dataclass(frozen=True)
class StateBatch:
    """States as the UNet sees them: `latents` (b, c, h, w) fp32 and `timesteps` (b,) on the device, the
    numbers of their `prompts`."""

    latents: Tensor
    timesteps: Tensor
    prompts: tuple[int, ...]


@torch.no_grad()
def run_trajectory(
    predict: Predict,
    embeddings: Conditioning,
    null: Conditioning,
    noise: Tensor,
    scheduler: Any,
    guidance_scale: float,
    prompt: int = 0,
) -> Trajectory:
    """The trajectory of one picture. It is sampled alone, so that it is the same bits in any company.

    Args:
        predict: the model that draws.
        embeddings: of the prompt alone.
        null: of the empty prompt.
        noise: (c, h, w), standard normal.
        scheduler: one of diffusers', fresh, with its timesteps set.
        guidance_scale: classifier-free guidance; 1 is none.
        prompt: number to keep with it.
    """
    device = embeddings.device
    pair = Conditioning.cat([null, embeddings])
    latents = noise.to(device)[None] * scheduler.init_noise_sigma
    states, scales = [], []
    for timestep in scheduler.timesteps:
        scale = scheduler.scale_model_input(torch.ones((), device=device), timestep)
        states.append(latents[0].to("cpu", torch.float16))
        scales.append(scale.cpu())
        empty, full = predict(
            (latents * scale).expand(2, -1, -1, -1), timestep.to(device).expand(2), pair
        ).chunk(2)
        latents = scheduler.step(empty + guidance_scale * (full - empty), timestep, latents).prev_sample
    return Trajectory(prompt, torch.stack(states), scheduler.timesteps.cpu(), torch.stack(scales).float())


class TrajectoryBuffer:
    """A few trajectories from which every update draws states; one draw in `refresh_every` replaces the
    oldest.

    Args:
        embeddings: of n prompts; trajectory i is sampled for prompt i mod n.
        null: of the empty prompt.
        latent_shape: (c, h, w).
        scheduler: makes a fresh scheduler of diffusers with its timesteps set.
        generator: number of a trajectory -> the CPU generator of its noise.
        guidance_scale: classifier-free guidance while sampling.
        size: trajectories that are kept.
        refresh_every: draws from one replacement to the next.
    """

    def __init__(
        self,
        embeddings: Conditioning,
        null: Conditioning,
        latent_shape: tuple[int, int, int],
        scheduler: Callable[[], Any],
        generator: Callable[[int], torch.Generator],
        *,
        guidance_scale: float = 3.0,
        size: int = 8,
        refresh_every: int = 25,
    ):
        self._embeddings, self._null, self._shape = embeddings, null, latent_shape
        self._scheduler, self._generator, self._guidance = scheduler, generator, guidance_scale
        self._refresh_every = refresh_every
        self._made = self._draws = 0
        self._kept: deque[Trajectory] = deque(maxlen=size)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """Those it holds now, the oldest first."""
        return tuple(self._kept)

    def state(self) -> dict[str, Any]:
        """What draws have changed, for `restore`."""
        return {
            "made": self._made,
            "draws": self._draws,
            "kept": [vars(trajectory) for trajectory in self._kept],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._made, self._draws = state["made"], state["draws"]
        self._kept.extend(Trajectory(**values) for values in state["kept"])

    def draw(self, teacher: Predict, count: int, generator: torch.Generator) -> StateBatch:
        """`count` states, trajectory and step uniformly at random; samples with `teacher` what is missing or
        due first."""
        while len(self._kept) < self._kept.maxlen:
            self._sample(teacher)
        if self._draws and self._draws % self._refresh_every == 0:
            self._sample(teacher)
        self._draws += 1
        latents, timesteps, prompts = [], [], []
        for _ in range(count):
            picked = self._kept[int(torch.randint(len(self._kept), (), generator=generator))]
            i = int(torch.randint(len(picked.states), (), generator=generator))
            latents.append(picked.states[i].float() * picked.scales[i])
            timesteps.append(picked.timesteps[i])
            prompts.append(picked.prompt)
        device = self._embeddings.device
        return StateBatch(torch.stack(latents).to(device), torch.stack(timesteps).to(device), tuple(prompts))

    def _sample(self, teacher: Predict) -> None:
        number, prompt = self._made, self._made % len(self._embeddings)
        noise = torch.randn(self._shape, generator=self._generator(number))
        made = run_trajectory(
            teacher, self._embeddings[prompt], self._null, noise, self._scheduler(), self._guidance, prompt
        )
        self._kept.append(made)
        self._made += 1
