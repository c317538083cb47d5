"""Rectified flow: straight paths from images to noise; the network predicts the velocity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .noise_process import NoiseProcess, Solver


class _Euler(Solver):
    def __init__(self, times: Tensor, last: Tensor):
        self.times, self._next = times, torch.cat([times[1:], last[None]])

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        after = self._next[int((self.times == time.cpu()).nonzero()[0])]
        return latents + (after - time.cpu()).item() * prediction


@dataclass(frozen=True)
class FlowProcess(NoiseProcess):
    """Rectified flow x_t = (1 - t) x_0 + t eps with velocity eps - x_0 (Liu et al., arXiv 2209.03003).

    Args:
        shift: s of the timestep shift t = s u / (1 + (s - 1) u) for uniform u (Esser et al., arXiv
            2403.03206, equation 23); values above 1 draw noisier latents more often.
    """

    shift: float = 1.0

    @property
    def predicts(self) -> str:
        return "flow"

    def _shifted(self, uniform: Tensor) -> Tensor:
        return self.shift * uniform / (1 + (self.shift - 1) * uniform)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return self._shifted(torch.rand(count, generator=generator))

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times.view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def clean(self, prediction: Tensor, noised: Tensor, times: Tensor) -> Tensor:
        return noised - times.view(-1, 1, 1, 1) * prediction

    def sampler(self, steps: int) -> Solver:
        """Euler's method, from pure noise at t = 1 to t = 0."""
        return self.trajectory(steps)

    def trajectory(self, steps: int, spacing: str = "trailing") -> Solver:
        """Euler's method; with `leading` spacing the step at t = 1, which is pure noise, is left out."""
        edges = self._shifted(torch.linspace(1, 0, steps + 1 + (spacing == "leading")))[
            spacing == "leading" :
        ]
        return _Euler(edges[:-1], edges[-1])
