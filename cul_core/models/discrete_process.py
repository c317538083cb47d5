"""The discrete noise process of Stable Diffusion, with its solvers: DDIM, and DPM-Solver++ of second order.

The solvers round as diffusers' schedulers of these names do, bit for bit, and need PyTorch alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError
from .noise_process import NoiseProcess, Solver


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

    @property
    def predicts(self) -> str:
        return {"epsilon": "noise", "v_prediction": "velocity"}[self.prediction_type]

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
        """See `DPMSolver`."""
        return DPMSolver(self._table(), self.prediction_type == "v_prediction", steps)

    def trajectory(self, steps: int, spacing: str = "trailing") -> Solver:
        """See `DDIM`."""
        return DDIM(self._table(), self.prediction_type == "v_prediction", steps, spacing)

    def _table(self) -> Tensor:
        """abar (timesteps,) for the solvers, computed in fp32 as diffusers does."""
        ends = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(*ends, self.timesteps, dtype=torch.float32, device="cpu") ** 2
        if self.ends_in_noise:
            signal = torch.cumprod(1 - betas, 0).sqrt()
            first, last = signal[0].clone(), signal[-1].clone()
            abar = ((signal - last) * (first / (first - last))) ** 2
            betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
        return torch.cumprod(1 - betas, 0)


def _trailing(total: int, steps: int) -> Tensor:
    return torch.from_numpy(np.arange(total, 0, -total / steps).round().astype(np.int64) - 1)


class DDIM(Solver):
    """Deterministic DDIM (Song et al., arXiv 2010.02502, equation 12 with sigma = 0).

    Args:
        abar: cumulative products (timesteps,) of 1 - beta.
        predicts_velocity: whether predictions are velocities instead of noise.
        steps: number of steps.
        spacing: `trailing`, or `leading`: multiples of timesteps // steps.
    """

    def __init__(self, abar: Tensor, predicts_velocity: bool, steps: int, spacing: str):
        self._abar, self._predicts_velocity, self._stride = abar, predicts_velocity, len(abar) // steps
        leading = torch.arange(steps - 1, -1, -1) * self._stride
        self.times = leading if spacing == "leading" else _trailing(len(abar), steps)

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        now = self._abar[int(time)]
        after = self._abar[max(int(time) - self._stride, 0)]
        if self._predicts_velocity:
            clean = now**0.5 * latents - (1 - now) ** 0.5 * prediction
            noise = now**0.5 * prediction + (1 - now) ** 0.5 * latents
        else:
            clean, noise = (latents - (1 - now) ** 0.5 * prediction) / now**0.5, prediction
        return after**0.5 * clean + (1 - after) ** 0.5 * noise


class DPMSolver(Solver):
    """DPM-Solver++(2M) in its midpoint form (Lu et al., arXiv 2211.01095, algorithm 2), trailing spacing.

    The last step, to sigma = 0, is of first order.

    Args:
        abar: cumulative products (timesteps,) of 1 - beta.
        predicts_velocity: whether predictions are velocities instead of noise.
        steps: number of steps.
    """

    def __init__(self, abar: Tensor, predicts_velocity: bool, steps: int):
        self._predicts_velocity, self.times = predicts_velocity, _trailing(len(abar), steps)
        abar = torch.cat([abar[:-1], abar[-1:].clamp(min=2.0**-24)])  # no infinite sigma at zero SNR
        sigmas = ((1 - abar) / abar) ** 0.5
        self._sigmas = torch.cat([sigmas[self.times], torch.zeros(1)])
        self._earlier: Tensor | None = None

    def _scales(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, log(alpha / sigma)) of the variance-preserving process, each ()."""
        alpha = 1 / (self._sigmas[step] ** 2 + 1) ** 0.5
        sigma = self._sigmas[step] * alpha
        return alpha, sigma, alpha.log() - sigma.log()

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        step = int((self.times == time.cpu()).nonzero()[0])
        (alpha, sigma, now), (alpha_after, sigma_after, after) = self._scales(step), self._scales(step + 1)
        if self._predicts_velocity:
            clean = alpha * latents - sigma * prediction
        else:
            clean = (latents - sigma * prediction) / alpha
        h, earlier, self._earlier = after - now, self._earlier, clean
        weight = alpha_after * (torch.exp(-h) - 1.0)
        result = (sigma_after / sigma) * latents - weight * clean
        if earlier is None or step == len(self.times) - 1:
            return result
        ratio = (now - self._scales(step - 1)[2]) / h
        return result - 0.5 * weight * ((1.0 / ratio) * (clean - earlier))
