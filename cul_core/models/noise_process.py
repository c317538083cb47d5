"""Noise schedule and sampling shared by every family: add noise, convert predictions, sample with
guidance."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Stable Diffusion's scaled-linear schedule; `alphas_cumprod` is (1000,) fp32 on the CPU (Ho et al.,
    arXiv 2006.11239).

    With `ends_in_noise`, it is shifted and scaled so that no signal is left at the end (Lin et al., arXiv
    2305.08891, algorithm 1).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    ends_in_noise: bool = False
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        betas = (
            torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float64) ** 2
        )
        abar = torch.cumprod(1 - betas, 0)
        if self.ends_in_noise:
            signal = abar.sqrt()
            abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()
        object.__setattr__(self, "alphas_cumprod", abar.float())

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (b, 1, 1, 1)."""
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of (b, c, h, w) latents at integer `timesteps` (b,)."""
        signal, sigma = self.coefficients(timesteps)
        return signal * latents + sigma * noise

    def target(self, prediction_type: str, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect UNet says at z_t of `add_noise`: the noise, or the velocity sqrt(abar_t) eps -
        sqrt(1 - abar_t) z0."""
        if prediction_type == "epsilon":
            return noise
        signal, sigma = self.coefficients(timesteps)
        return signal * noise - sigma * latents

    def solver(self, prediction_type: str, steps: int):
        """diffusers' DPM-Solver++ (2M; Lu et al., arXiv 2211.01095) over `steps` steps of this schedule."""
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=self.timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=self.ends_in_noise,
        )
        scheduler.set_timesteps(steps)
        return scheduler

    def ddim(self, prediction_type: str, steps: int, timestep_spacing: str = "trailing"):
        """diffusers' deterministic DDIM (Song et al., arXiv 2010.02502) over `steps` steps of this schedule,
        from noisy to clean."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            num_train_timesteps=self.timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=self.ends_in_noise,
        )
        scheduler.set_timesteps(steps)
        return scheduler
