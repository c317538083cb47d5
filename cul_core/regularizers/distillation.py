"""Data-free distillation: match the teachers on states of images that the teachers sample."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..concepts.concept import LONGEST_PROMPT, Concept, check_count, check_text, display_name
from ..models.sampling import Predict
from ..models.text_conditioning import Conditioning
from ..models.trajectory_buffer import TrajectoryBuffer
from ..parts.part import Cost, Teachers
from ..parts.step_context import StepContext
from ..parts.training_config import TrainingConfig
from .base import REGULARIZERS, Regularizer


@dataclass(frozen=True)
class DistillationConfig(Config):
    keep_weight: float = setting(
        1.0,
        "Weight of distillation from the pretrained model on prompts to keep (a); 0 turns it off.",
        minimum=0.0,
    )
    previous_weight: float = setting(
        1.0,
        "Weight of distillation from the step's start on earlier targets (b); 0 turns it off.",
        minimum=0.0,
    )
    batch_size: int = setting(1, "States per update, for each of the two terms.", minimum=1, maximum=1024)
    trajectories: int = setting(
        8,
        "Sampling trajectories of the teacher in the replay buffer, from whose states updates draw; for each "
        "of the two terms. Sampling them costs time.",
        minimum=1,
        maximum=10_000,
    )
    refresh_every: int = setting(
        25,
        "Updates after which the oldest trajectory is replaced, by one for another prompt.",
        minimum=1,
    )
    trajectory_steps: int = setting(50, "Sampling steps (DDIM) of each trajectory.", minimum=1, maximum=1000)
    guidance_scale: float = setting(
        3.0, "Classifier-free guidance of the trajectories; 1 is none.", minimum=1.0
    )
    prompts: str = setting(
        "",
        "Further prompts to keep, separated by semicolons; those that name something forgotten are left out.",
    )

    def __post_init__(self):
        super().__post_init__()
        check_count("prompts to keep", prompts := self.own_prompts())
        for prompt in prompts:
            check_text("prompt to keep", prompt, LONGEST_PROMPT)

    def own_prompts(self) -> list[str]:
        """The user's prompts, without empty ones."""
        return [prompt.strip() for prompt in re.split(r"[;\n]", self.prompts) if prompt.strip()]


def held_prompts(
    context: StepContext, config: DistillationConfig, generator: torch.Generator
) -> dict[str, list[str]]:
    """Distillation prompts by term (`keep`, `previous`), one per trajectory of the whole step.

    `keep` alternates between three sources, where they are not empty: concepts to retain; the empty prompt
    and the anchor prompts; the user's own prompts. `previous` has earlier targets. A concept's prompt is an
    anchor prompt rewritten for the concept, or its bare prompt if no anchor prompt can be rewritten.
    """
    targets, previous = (
        {concept.name.lower() for concept in concepts} for concepts in (context.concepts, context.previous)
    )
    kept = [concept for concept in context.retain if concept.name.lower() not in targets | previous]
    forgotten = [
        concept for concept in dict.fromkeys(context.previous) if concept.name.lower() not in targets
    ]
    anchor = display_name(context.concepts[0].anchor)

    def shuffled(items: Sequence) -> list:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    def allowed(prompts: Iterable[str]) -> list[str]:
        named = (*context.concepts, *context.previous)
        return shuffled(
            [
                prompt
                for prompt in dict.fromkeys(prompts)
                if not any(concept.mentioned_in(prompt) for concept in named)
            ]
        )

    def picked(items: Sequence[str]) -> str:
        return items[int(torch.randint(len(items), (), generator=generator))]

    def sentences(concepts: Sequence[Concept]) -> Iterator[str]:
        for concept in cycle(shuffled(concepts)):
            placed = concept.in_the_place_of(anchor)
            yield picked((captions and placed.target_prompts(picked(captions))) or [placed.prompt])

    captions = allowed(context.anchor_prompts)
    own = allowed(config.own_prompts())
    count = config.trajectories + context.training.iterations // config.refresh_every
    turns = [sentences(kept)] * bool(kept) + [cycle(["", *captions])] + [cycle(own)] * bool(own)
    return {
        "keep": [next(turn) for turn in islice(cycle(turns), count)],
        "previous": list(islice(sentences(forgotten), count)),
    }


class _Held:
    """One term of the distillation: its prompts, its weight, and a replay buffer of the teacher's states."""

    def __init__(
        self,
        name: str,
        weight: float,
        prompts: Sequence[str],
        context: StepContext,
        config: DistillationConfig,
    ):
        network = context.network
        self.weight, self._embeddings, self._count = weight, network.encode(prompts), config.batch_size
        self._buffer = TrajectoryBuffer(
            self._embeddings,
            network.encode([""]),
            network.family.latent_shape,
            lambda: network.process.trajectory(config.trajectory_steps),
            lambda number: context.generator("distillation", name, number),
            guidance_scale=config.guidance_scale,
            size=config.trajectories,
            refresh_every=config.refresh_every,
        )

    def state(self) -> dict[str, Any]:
        return self._buffer.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._buffer.restore(state)

    def draw(
        self, teacher: Predict, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
        """(latents, timesteps, conditioning, the teacher's predictions) of one batch of states."""
        states = self._buffer.draw(teacher, self._count, generator)
        inputs = states.latents, states.times, self._embeddings[list(states.prompts)]
        return *inputs, teacher(*inputs)


@REGULARIZERS.register(
    "distillation",
    config=DistillationConfig,
    display_name="Distillation",
    description="Keeps the model's predictions those of the pretrained model on images to keep, and those "
    "from before the step on images of earlier targets.",
    paper="In the spirit of Song et al., Towards Lifelong Few-Shot Customization of Text-to-Image "
    "Diffusion, 2024, arXiv 2411.05544",
)
class Distillation(Regularizer):
    """L = L_unlearn + a L_keep + b L_previous, both means over states (z, t) of prompts p:

        L_keep      sum_c mean_{y,x} (f_W(z, t, p) - f_{W0}(z, t, p))^2         p in R, z from W0
        L_previous  sum_c mean_{y,x} (f_W(z, t, p) - f_{W_{k-1}}(z, t, p))^2    p in U, z from W_{k-1}

    R and U are the two lists of `held_prompts`. z is an intermediate latent of an image that the teacher
    samples for p with guidance; no data set is needed. Channels are summed as in Concept Ablation's loss, so
    a = b = 1 weighs a state as much as that loss does. Gradients flow through the start token even if the
    method blocks it: the start token's keys and values change with the rest, and all prompts share them. The
    paper names both kinds of forgetting; it has no code that we know of, and this formulation is ours.
    """

    config: DistillationConfig

    def prepare(self, context: StepContext) -> None:
        self._generator = context.generator("distillation")
        prompts = held_prompts(context, self.config, self._generator)
        weights = {"keep": self.config.keep_weight, "previous": self.config.previous_weight}
        self._held = {
            name: _Held(name, weight, prompts[name], context, self.config)
            for name, weight in weights.items()
            if weight and prompts[name]
        }

    def state(self) -> dict[str, Any]:
        return {
            "generator": self._generator.get_state(),
            "held": {name: held.state() for name, held in self._held.items()},
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self._generator.set_state(state["generator"])
        for name, held in self._held.items():
            held.restore(state["held"][name])

    def cost(
        self,
        training: TrainingConfig,
        concepts: Sequence[Concept],
        previous: Sequence[Concept],
        captions: int,
    ) -> Cost:
        config = self.config
        kinds = bool(config.keep_weight) + bool(config.previous_weight and previous)
        prompts = config.trajectories + training.iterations // config.refresh_every
        return Cost(kinds * config.batch_size, kinds * config.batch_size, kinds * prompts)

    def loss_terms(self, student: Predict, teachers: Teachers) -> dict[str, Tensor]:
        asked = {"keep": teachers.pretrained, "previous": teachers.start}
        drawn = [held.draw(asked[name], self._generator) for name, held in self._held.items()]
        if not drawn:
            return {}
        latents, timesteps, embeddings, goals = zip(*drawn, strict=True)
        predicted = student(torch.cat(latents), torch.cat(timesteps), Conditioning.cat(embeddings))
        errors = (predicted - torch.cat(goals)).square().sum(1).mean((1, 2)).chunk(len(drawn))
        return {
            name: held.weight * error.mean()
            for (name, held), error in zip(self._held.items(), errors, strict=True)
        }
