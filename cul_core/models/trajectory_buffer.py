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
    """The sampling trajectory of one image.

    Args:
        prompt: index of its prompt.
        states: latents (T, c, h, w) in fp16 on the CPU; step i starts from state i, so state 0 is noise.
        times: times (T,) of the states.
    """

    prompt: int
    states: Tensor
    times: Tensor


@dataclass(frozen=True)
class StateBatch:
    """A batch of states drawn from the replay buffer.

    Args:
        latents: (b, c, h, w) in fp32 on the device.
        times: (b,) on the device.
        prompts: index of each state's prompt.
    """

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
    """The trajectory of one image, sampled in a batch of one so that its bits depend on no other image.

    Args:
        predict: the model that samples.
        conditioning: encoded prompt, a batch of 1.
        null: encoded empty prompt, a batch of 1.
        noise: standard normal (c, h, w).
        solver: a fresh solver.
        guidance_scale: classifier-free guidance; 1 is none.
        prompt: index of the prompt, which the trajectory carries.
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
    """Replay buffer of trajectories from which updates draw states.

    Every `refresh_every` draws a new trajectory replaces the oldest.

    Args:
        conditioning: encoded prompts, a batch of n; trajectory i is sampled for prompt i mod n.
        null: encoded empty prompt, a batch of 1.
        latent_shape: (c, h, w).
        solver: makes a fresh solver.
        generator: index of a trajectory -> CPU generator of its noise.
        guidance_scale: classifier-free guidance while sampling.
        size: number of trajectories in the buffer.
        refresh_every: draws between two replacements.
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
        """Trajectories in the buffer, the oldest first."""
        return tuple(self._kept)

    def state(self) -> dict[str, Any]:
        """State that draws have changed, for `restore`."""
        kept = [vars(trajectory) for trajectory in self._kept]
        return {"made": self._made, "draws": self._draws, "kept": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a state that `state` gave; the buffer is new and empty."""
        self._made, self._draws = state["made"], state["draws"]
        self._kept.extend(Trajectory(**values) for values in state["kept"])

    def draw(self, teacher: Predict, count: int, generator: torch.Generator) -> StateBatch:
        """A batch of `count` states, drawn with uniformly random trajectory and step.

        `teacher` first samples missing trajectories and a replacement that is due.
        """
        while len(self._kept) < self._kept.maxlen:
            self._sample(teacher)
        if self._draws and self._draws % self._refresh_every == 0:
            self._sample(teacher)
        self._draws += 1
        latents, times, prompts = [], [], []
        for _ in range(count):
            trajectory = self._kept[int(torch.randint(len(self._kept), (), generator=generator))]
            i = int(torch.randint(len(trajectory.states), (), generator=generator))
            latents.append(trajectory.states[i].float())
            times.append(trajectory.times[i])
            prompts.append(trajectory.prompt)
        device = self._conditioning.device
        return StateBatch(torch.stack(latents).to(device), torch.stack(times).to(device), tuple(prompts))

    def _sample(self, teacher: Predict) -> None:
        number, prompt = self._made, self._made % len(self._conditioning)
        noise = torch.randn(self._shape, generator=self._generator(number))
        trajectory = run_trajectory(
            teacher, self._conditioning[prompt], self._null, noise, self._solver(), self._guidance, prompt
        )
        self._kept.append(trajectory)
        self._made += 1
