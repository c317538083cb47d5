"""Erased Stable Diffusion: train the target prompt towards negative classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..concepts.concept import Concept
from ..models.sampling import Predict
from ..models.text_conditioning import Conditioning
from ..models.trajectory_buffer import TrajectoryBuffer
from ..parts.part import Cost, LossTerms, Teachers
from ..parts.step_context import StepContext
from ..parts.training_config import TrainingConfig
from .base import METHODS, Method


@dataclass(frozen=True)
class ESDConfig(Config):
    """`reference` is what the authors' code does; the defaults are ours.

    The reference samples a new image for every update, up to a random step. `reference` keeps one trajectory
    and replaces it at every update, which gives states of the same distribution. The reference's bf16 weights
    are not offered, because updates at its learning rate round to zero in bf16.
    """

    negative_guidance: float = setting(
        2.0,
        "How far the target's prompt is pushed away from the target: 0 changes nothing, 1 gives the empty "
        "prompt's prediction, 2 goes as far again to the other side (the paper's 1).",
        minimum=0.0,
    )
    erase_from: str = setting(
        "",
        "Prompt inside which the target is erased, such as 'A house image'; only predictions for this prompt "
        "are trained. Empty: the target's own prompt.",
    )
    teacher: str = setting(
        "start",
        "Teacher that makes the predictions to train on: the step's start, as in the reference, or the "
        "pretrained model.",
        choices=("start", "pretrained"),
    )
    block_first_token: bool = setting(
        True, "Stop gradients through the keys and values of the start token, which all prompts share."
    )
    trajectories: int = setting(
        8,
        "Sampling trajectories of the teacher in the replay buffer, from whose states updates draw.",
        minimum=1,
        maximum=10_000,
    )
    refresh_every: int = setting(25, "Updates after which the oldest trajectory is replaced.", minimum=1)
    trajectory_steps: int = setting(50, "Sampling steps (DDIM) of each trajectory.", minimum=1, maximum=1000)
    guidance_scale: float = setting(
        3.0, "Classifier-free guidance of the trajectories; 1 is none.", minimum=1.0
    )
    REFERENCE: ClassVar[dict] = {"block_first_token": False, "trajectories": 1, "refresh_every": 1}


def erasing_goal(null: Tensor, concept: Tensor, wider: Tensor, negative_guidance: float) -> Tensor:
    """Regression target for the wider prompt: f(c_f) - eta (f(c_e) - f(null)), all (b, c, h, w).

    For c_e = c_f = c this is (1 - eta) f(c) + eta f(null), the paper's f(null) - eta' (f(c) - f(null)) with
    eta = 1 + eta'. Of the authors' two programs, one passes eta and the other eta' as its flag.

    Args:
        null: teacher's prediction f(null) for the empty prompt; noise or velocity.
        concept: teacher's prediction f(c_e) for the concept's prompt.
        wider: teacher's prediction f(c_f) for the prompt from which the concept is erased.
        negative_guidance: eta; 0 returns `wider`.
    """
    return wider - negative_guidance * (concept - null)


@METHODS.register(
    "esd",
    config=ESDConfig,
    display_name="Erased Stable Diffusion",
    description="Teaches the model to steer away from the target when asked for it; needs no anchor images.",
    paper="Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345",
)
class ESD(Method):
    """ESD's loss, the mean over b, c, h, w of

        (f_W(z_t, t, c_f) - sg[f_T(z_t, t, c_f) - eta (f_T(z_t, t, c_e) - f_T(z_t, t, null))])^2

    c_e is the target's prompt, c_f the prompt from which it is erased, T the teacher. z_t is an intermediate
    latent of an image that the teacher samples for c_f with guidance (authors' code, esd_sd.py). The targets
    of a request take turns.
    """

    config: ESDConfig

    def __init__(self, config: ESDConfig):
        super().__init__(config)
        self.blocks_first_token = config.block_first_token

    def cost(
        self,
        training: TrainingConfig,
        concepts: Sequence[Concept],
        previous: Sequence[Concept],
        captions: int,
    ) -> Cost:
        is_narrow = bool(self.config.erase_from.strip())
        return Cost(training.batch_size, training.batch_size * (2 + is_narrow), 1 + 2 * len(concepts))

    def prepare(self, context: StepContext) -> None:
        network, config = context.network, self.config
        self._batch = context.training.batch_size
        self._null = network.encode([""])
        self._concepts = network.encode([concept.prompt for concept in context.concepts])
        self._is_narrow = bool(config.erase_from.strip())
        self._wider = (
            network.encode([config.erase_from.strip()] * len(context.concepts))
            if self._is_narrow
            else self._concepts
        )
        self._buffer = TrajectoryBuffer(
            self._wider,
            self._null,
            network.family.latent_shape,
            lambda: network.process.trajectory(config.trajectory_steps),
            lambda number: context.generator("trajectory", number),
            guidance_scale=config.guidance_scale,
            size=config.trajectories,
            refresh_every=config.refresh_every,
        )

    def state(self) -> dict[str, Any]:
        return self._buffer.state()

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self._buffer.restore(state)

    def loss(self, student: Predict, teachers: Teachers, generator: torch.Generator) -> LossTerms:
        teacher = teachers.called(self.config.teacher)
        states = self._buffer.draw(teacher, self._batch, generator)
        latents, timesteps, picks = states.latents, states.times, list(states.prompts)
        concept, wider = self._concepts[picks], self._wider[picks]
        prompts = [self._null.expand(self._batch), concept, *([wider] if self._is_narrow else [])]
        count = len(prompts)
        predicted = teacher(
            latents.repeat(count, 1, 1, 1), timesteps.repeat(count), Conditioning.cat(prompts)
        ).chunk(count)
        goal = erasing_goal(predicted[0], predicted[1], predicted[-1], self.config.negative_guidance)
        loss = (student(latents, timesteps, wider) - goal).square().mean()
        return LossTerms(loss, {"unlearn": loss.item()})
