"""Distillation without data: on states of pictures that it draws itself, the model keeps predicting what its
teachers do."""

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
        "Weight of staying with the pretrained model on what is to be kept (a); 0 turns this off.",
        minimum=0.0,
    )
    previous_weight: float = setting(
        1.0,
        "Weight of staying with the step's start on what earlier steps forgot (b); 0 turns this off.",
        minimum=0.0,
    )
    batch_size: int = setting(1, "States per update, of each of the two.", minimum=1, maximum=1024)
    trajectories: int = setting(
        8,
        "Pictures by the teacher, in all their sampling steps, that updates draw from; of each of the two. "
        "They cost time.",
        minimum=1,
        maximum=10_000,
    )
    refresh_every: int = setting(
        25,
        "Updates after which the oldest of these pictures is replaced, by one of another prompt.",
        minimum=1,
    )
    trajectory_steps: int = setting(50, "Sampling steps (DDIM) of each.", minimum=1, maximum=1000)
    guidance_scale: float = setting(
        3.0, "Classifier-free guidance of these pictures; 1 is none.", minimum=1.0
    )
    prompts: str = setting(
        "",
        "Further prompts to keep, separated by semicolons; those that name something forgotten are left out.",
    )

    def __post_init__(self):
        super().__post_init__()
        check_count("prompts to keep", found := self.own_prompts())
        for prompt in found:
            check_text("prompt to keep", prompt, LONGEST_PROMPT)

    def own_prompts(self) -> list[str]:
        return [prompt.strip() for prompt in re.split(r"[;\n]", self.prompts) if prompt.strip()]


def held_prompts(
    context: StepContext, config: DistillationConfig, generator: torch.Generator
) -> dict[str, list[str]]:
    """Prompts of what is kept and of what earlier steps forgot (`keep`, `previous`), one for each picture
    that is ever drawn.

    `keep` takes turns between the kept concepts, the empty prompt with the anchor prompts, and the user's
    own, as far as there are any. A concept's prompt is an anchor prompt with the concept in it, or the one
    that names it alone where it fits into none.
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
    """Prompts whose pictures stay as a teacher draws them, and states of these pictures; `weight` is that of
    their term."""

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
        """(latents, timesteps, encoded prompts, what the teacher predicts there) of some states."""
        states = self._buffer.draw(teacher, self._count, generator)
        inputs = states.latents, states.times, self._embeddings[list(states.prompts)]
        return *inputs, teacher(*inputs)


@REGULARIZERS.register(
    "distillation",
    config=DistillationConfig,
    display_name="Distillation",
    description="Has the model go on predicting what the pretrained one does where it draws what is to be "
    "kept, and what it did before the step where it draws what earlier steps forgot.",
    paper="In the spirit of Song et al., Towards Lifelong Few-Shot Customization of Text-to-Image "
    "Diffusion, 2024, arXiv 2411.05544",
)
class Distillation(Regularizer):
    """L = L_unlearn + a L_keep + b L_previous, where the latter two are the mean over states (z, t) of
    prompts p of

        L_keep      sum_c mean_{y,x} (f_W(z, t, p) - f_{W0}(z, t, p))^2         p in R, z from W0
        L_previous  sum_c mean_{y,x} (f_W(z, t, p) - f_{W_{k-1}}(z, t, p))^2    p in U, z from W_{k-1}

    R and U are `held_prompts`; z is a state of a picture that the teacher named draws for p, with guidance;
    no pictures are stored. Channels are summed, as in Concept Ablation's loss, so that a = b = 1 weighs a
    state as much as that does. Gradients flow through the start token too, whatever the method blocks: its
    keys and values change with the rest, and all prompts share them. The paper tells the two kinds of
    forgetting apart; it has no code that we know of, and this formulation is ours.
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
