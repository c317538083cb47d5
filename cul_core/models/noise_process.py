"""Noise processes: how latents are noised, what a network predicts, and the solvers that sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base.errors import ConfigError


class Solver(ABC):
    """An ODE solver over its own time steps, from noise to image; it is stateful and serves one batch."""

    times: Tensor
    """Times (steps,) of the steps on the CPU, from noisy to clean."""

    @abstractmethod
    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) at the next time, from those and the raw prediction at `time`."""


class NoiseProcess(ABC):
    """A noise process; it hides from algorithms whether a network predicts noise, velocity or flow."""

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


class _DiffusersSolver(Solver):
    def __init__(self, scheduler: object, steps: int):
        scheduler.set_timesteps(steps)
        self._scheduler, self.times = scheduler, scheduler.timesteps

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        return self._scheduler.step(prediction, time, latents).prev_sample


@dataclass(frozen=True)
class DiscreteProcess(NoiseProcess):
    """Stable Diffusion's DDPM schedule, scaled-linear over 1000 steps (Ho et al., arXiv 2006.11239).

    Args:
        prediction_type: `epsilon` for the noise, `v_prediction` for the velocity
            sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (Salimans and Ho, arXiv 2202.00512).
        ends_in_noise: whether the schedule is rescaled to zero terminal SNR (Lin et al., arXiv 2305.08891,
            algorithm 1); for velocities only, as the last step has no signal.
        beta_start: noise variance of the first step.
        beta_end: noise variance of the last step.
        timesteps: number of steps.

    Raises:
        ConfigError: the network predicts noise on a schedule with zero terminal SNR: at its last step, a
            noise prediction implies no clean latents.
    """

    prediction_type: str = "epsilon"
    ends_in_noise: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.ends_in_noise and self.prediction_type == "epsilon":
            raise ConfigError(
                "prediction_type is 'epsilon' on a schedule with zero terminal SNR, whose last step has no "
                "signal; choose 'v_prediction', or a schedule that is not rescaled."
            )
        betas = torch.linspace(
            self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float64, device="cpu"
        )
        abar = torch.cumprod(1 - betas**2, 0)
        if self.ends_in_noise:
            signal = abar.sqrt()
            abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()
        object.__setattr__(self, "alphas_cumprod", abar.float())

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.timesteps, (count,), generator=generator)

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod.to(times.device)[times].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self.coefficients(times)
        return signal * noise - sigma * latents

    def clean(self, prediction: Tensor, noised: Tensor, times: Tensor) -> Tensor:
        signal, sigma = self.coefficients(times)
        if self.prediction_type == "epsilon":
            return (noised - sigma * prediction) / signal
        return signal * noised - sigma * prediction

    def sampler(self, steps: int) -> Solver:
        """diffusers' DPM-Solver++ (2M; Lu et al., arXiv 2211.01095)."""
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            **self._settings(), algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
        )
        return _DiffusersSolver(scheduler, steps)

    def trajectory(self, steps: int, spacing: str = "trailing") -> Solver:
        """diffusers' deterministic DDIM (Song et al., arXiv 2010.02502)."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            **self._settings(), clip_sample=False, set_alpha_to_one=False, timestep_spacing=spacing
        )
        return _DiffusersSolver(scheduler, steps)

    def _settings(self) -> dict[str, object]:
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.ends_in_noise,
        }
