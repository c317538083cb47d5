"""Concept Ablation: the prediction for the target prompt becomes that for the anchor prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import Config, setting
from ..embeddings import Embeddings
from ..errors import ConceptError
from .base import METHODS, LossParts, Method, Predict, StepContext


@dataclass(frozen=True)
class ConAblConfig(Config):
    """`reference` is what the authors' code does; the defaults are ours."""

    teacher: str = setting("start", "Whose anchor prediction is the goal: the step's start, the pretrained model, or the "
                           "student itself as in the reference.", choices=("start", "pretrained", "student"))  # fmt: skip
    block_first_token: bool = setting(True, "Stop gradients through the keys and values of the start token, which all prompts share.")
    REFERENCE: ClassVar[dict] = {"teacher": "student"}


@METHODS.register(
    "conabl",
    config=ConAblConfig,
    display_name="Concept Ablation",
    description="Teaches the model to draw the anchor when asked for the target.",
    paper="Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516",
    families=("mini", "sd1", "sd2", "sdxl"),
    groups=("kv", "attn2", "attn", "full"),
)
class ConAbl(Method):
    """L = mean_b sum_c mean_{y,x} (f_W(z_t, t, E(p*)) - sg[f_teacher(z_t, t, E(p))])^2, (Kumari et al., eq. 3).

    Channels are summed, not averaged, as in the reference, whose penalty weights are calibrated to that.

    Raises:
        ConceptError: no anchor prompt can be rewritten for one of the targets.
    """

    config: ConAblConfig

    def __init__(self, config: ConAblConfig):
        super().__init__(config)
        self.teacher_is_pretrained = config.teacher == "pretrained"
        self.blocks_first_token = config.block_first_token

    def prepare(self, context: StepContext) -> None:
        self._schedule, self._latents, self._batch = context.schedule, context.anchor_latents, context.training.batch_size
        named = (*context.concepts, *context.previous)
        self._pairs: list[tuple[int, Embeddings]] = []
        bundle = context.bundle
        for concept in context.concepts:
            rewritten = [(i, concept.target_prompts(prompt)) for i, prompt in enumerate(context.anchor_prompts)
                         if not any(other.mentioned_in(prompt) for other in named)]  # fmt: skip
            rewritten = [(i, prompts) for i, prompts in rewritten if prompts]
            if not rewritten:
                raise ConceptError(f"No anchor prompt can be turned into one for {concept.target!r}; add prompts that name its "
                                   f"anchor ({concept.anchor or 'any caption without a style'!r}) and not the target.")  # fmt: skip
            self._pairs += [(i, bundle.encode(prompts)) for i, prompts in rewritten]
        self._anchors = bundle.encode(context.anchor_prompts)

    def loss(self, student: Predict, teacher: Predict, generator: torch.Generator) -> LossParts:
        picks = torch.randint(len(self._pairs), (self._batch,), generator=generator).tolist()
        anchors = torch.tensor([self._pairs[i][0] for i in picks])
        targets = []
        for i in picks:
            versions = self._pairs[i][1]
            targets.append(versions[int(torch.randint(len(versions), (), generator=generator))])
        clean = self._latents[anchors]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        timesteps = torch.randint(self._schedule.timesteps, (self._batch,), generator=generator).to(clean.device)
        noisy = self._schedule.add_noise(clean, noise, timesteps)
        with torch.no_grad():
            goal = (student if self.config.teacher == "student" else teacher)(noisy, timesteps, self._anchors[anchors])
        predicted = student(noisy, timesteps, Embeddings.cat(targets))
        loss = (predicted - goal).square().sum(1).mean()
        return LossParts(loss, {"unlearn": loss.item()})
