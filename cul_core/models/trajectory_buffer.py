"""Replay buffer of intermediate latents of a teacher's sampling trajectories."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise_process import Solver
from .sampling import Predict, run_solver
from .text_conditioning import Conditioning


@dataclass(frozen=True)
class Trajectory:
    """The states of one image.

    Args:
        prompt: number of the prompt it was sampled for.
        states: (T, c, h, w) fp16 on the CPU; state i is what step i starts from, so state 0 is noise.
        times: (T,), those of the steps.
    """

    prompt: int
    states: Tensor
    times: Tensor


@dataclass(frozen=True)
class StateBatch:
    """`latents` (b, c, h, w) fp32 and `times` (b,) on the device, and the numbers of their `prompts`."""

    latents: Tensor
    times: Tensor
    prompts: tuple[int, ...]


def run_trajectory(
    predict: Predict,
    conditioning: Conditioning,
    null: Conditioning,
    noise: Tensor,
    solver: Solver,
    guidance_scale: float,
    prompt: int = 0,
) -> Trajectory:
    """The trajectory of one image. It is sampled alone, so that it is the same bits in any company.

    Args:
        predict: the model that draws.
        conditioning: of the prompt alone.
        null: of the empty prompt.
        noise: (c, h, w), standard normal.
        solver: a fresh one.
        guidance_scale: classifier-free guidance; 1 is none.
        prompt: number to keep with it.
    """
    states = []
    run_solver(
        predict,
        noise.to(conditioning.device)[None],
        solver,
        conditioning,
        null,
        guidance_scale,
        lambda latents, time: states.append(latents[0].to("cpu", torch.float16)),
    )
    return Trajectory(prompt, torch.stack(states), solver.times.cpu())


class TrajectoryBuffer:
    """A few trajectories from which every update draws states; one draw in `refresh_every` replaces the
    oldest.

    Args:
        conditioning: of n prompts; trajectory i is sampled for prompt i mod n.
        null: of the empty prompt.
        latent_shape: (c, h, w).
        solver: makes a fresh solver.
        generator: number of a trajectory -> the CPU generator of its noise.
        guidance_scale: classifier-free guidance while sampling.
        size: trajectories that are kept.
        refresh_every: draws from one replacement to the next.
    """

    def __init__(
        self,
        conditioning: Conditioning,
        null: Conditioning,
        latent_shape: tuple[int, int, int],
        solver: Callable[[], Solver],
        generator: Callable[[int], torch.Generator],
        *,
        guidance_scale: float = 3.0,
        size: int = 8,
        refresh_every: int = 25,
    ):
        self._conditioning, self._null, self._shape = conditioning, null, latent_shape
        self._solver, self._generator, self._guidance = solver, generator, guidance_scale
        self._refresh_every = refresh_every
        self._made = self._draws = 0
        self._kept: deque[Trajectory] = deque(maxlen=size)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """Those it holds now, the oldest first."""
        return tuple(self._kept)

    def state(self) -> dict[str, Any]:
        """What draws have changed, for `restore`."""
        kept = [vars(trajectory) for trajectory in self._kept]
        return {"made": self._made, "draws": self._draws, "kept": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._made, self._draws = state["made"], state["draws"]
        self._kept.extend(Trajectory(**values) for values in state["kept"])

    def draw(self, teacher: Predict, count: int, generator: torch.Generator) -> StateBatch:
        """`count` states, trajectory and step uniformly at random; `teacher` samples what is missing or due
        first."""
        while len(self._kept) < self._kept.maxlen:
            self._sample(teacher)
        if self._draws and self._draws % self._refresh_every == 0:
            self._sample(teacher)
        self._draws += 1
        latents, times, prompts = [], [], []
        for _ in range(count):
            picked = self._kept[int(torch.randint(len(self._kept), (), generator=generator))]
            i = int(torch.randint(len(picked.states), (), generator=generator))
            latents.append(picked.states[i].float())
            times.append(picked.times[i])
            prompts.append(picked.prompt)
        device = self._conditioning.device
        return StateBatch(torch.stack(latents).to(device), torch.stack(times).to(device), tuple(prompts))

    def _sample(self, teacher: Predict) -> None:
        number, prompt = self._made, self._made % len(self._conditioning)
        noise = torch.randn(self._shape, generator=self._generator(number))
        made = run_trajectory(
            teacher, self._conditioning[prompt], self._null, noise, self._solver(), self._guidance, prompt
        )
        self._kept.append(made)
        self._made += 1
