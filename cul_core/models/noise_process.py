"""Noise processes: how latents are noised, what a network predicts, and the solvers that sample."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Solver(ABC):
    """An ODE solver over its own time steps, from noise to image; it is stateful and serves one batch."""

    times: Tensor
    """Times (steps,) of the steps on the CPU, from noisy to clean."""

    @abstractmethod
    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) at the next time, from those and the raw prediction at `time`."""


class NoiseProcess(ABC):
    """A noise process; it hides from algorithms whether a network predicts noise, velocity or flow.

    `predicts` says for users what the network predicts.
    """

    predicts: str

    @abstractmethod
    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Random training times (count,) on the CPU."""

    @abstractmethod
    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, sigma), each (b, 1, 1, 1), of noised latents = signal * latents + sigma * noise."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Training target (b, c, h, w): the ideal raw prediction at the noised latents."""

    @abstractmethod
    def clean(self, prediction: Tensor, noised: Tensor, times: Tensor) -> Tensor:
        """Clean latents (b, c, h, w) that a raw prediction at the noised latents implies."""

    @abstractmethod
    def sampler(self, steps: int) -> Solver:
        """A fresh higher-order solver, for good images in few steps."""

    @abstractmethod
    def trajectory(self, steps: int, spacing: str = "trailing") -> Solver:
        """A fresh deterministic first-order solver; `spacing` of its times is `trailing` or `leading`."""

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noised latents (b, c, h, w) at times (b,)."""
        signal, sigma = self.coefficients(times)
        return signal * latents + sigma * noise
