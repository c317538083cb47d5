"""What audits by prediction errors share: images by the pretrained model, noised in the same way for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.errors import ConceptError, ModelError
from ..concepts.captions import anchor_prompts
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel, weights_of
from ..models.family import Family
from ..models.network import Network
from ..models.noise_process import Solver
from ..models.sampling import SamplerConfig, generator_for, run_solver, sample_latents
from ..models.text_conditioning import Conditioning

Progress = Callable[[int, int], None]


def edited(network: Network, model: UnlearnModel) -> AbstractContextManager[None]:
    """Within the block, the network has the weights of `model` instead of the pretrained ones."""
    return network.with_weights(weights_of(model, network.exact(list(model.edits))))


def audited_concepts(model: UnlearnModel, concepts: Sequence[Concept]) -> tuple[Concept, ...]:
    """The concepts to audit: the given ones, else those of the model's history.

    Raises:
        ConceptError: there are none.
        ModelError: the model was edited, and the weights from before are not known.
    """
    if model.forgotten and not model.edits:
        raise ModelError(
            f"{model.source.name!r} was edited, and this audit compares with the weights from before; give "
            "the file that it was made from as the pretrained one."
        )
    found = tuple(concepts) or tuple(Concept(**values) for values in model.forgotten)
    if not found:
        raise ConceptError("The model has forgotten nothing; name the concepts to audit.")
    return found


def captions_of(family: Family, concept: Concept, count: int, seed: int) -> list[str]:
    """`count` captions that name the concept, each with other things beside it."""
    if concept.kind == "memorized":
        return [concept.name] * count
    if concept.kind == "style":
        plain = anchor_prompts(family, [concept])
        found = [prompt for caption in plain for prompt in concept.target_prompts(caption)]
    else:
        found = list(anchor_prompts(family, [Concept("thing", "object", concept.target)]))
    random.Random(f"audited captions {seed}").shuffle(found)
    return [found[i % len(found)] for i in range(count)]


def made_up_names(network: Network, count: int, seed: int) -> list[str]:
    """Names of two words of the vocabulary each, which are the control: no model was ever told of them."""
    rng, words = random.Random(f"audit's made-up names {seed}"), network.words() or ["thing"]
    return [" ".join(rng.choices(words, k=2)).title() for _ in range(count)]


def sampler_of(family: Family) -> SamplerConfig:
    """How audits sample images of a family."""
    if family.recipe is None:
        return SamplerConfig()
    return SamplerConfig(family.recipe.anchor_steps, family.recipe.anchor_guidance)


def images_of(
    network: Network,
    concept: Concept,
    count: int,
    seed: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Latents (count, c, h, w) of images of the concept, sampled with the network's present weights."""
    captions = captions_of(network.family, concept, count, seed)
    generators = [generator_for(seed, "audited image", concept.name, i) for i in range(count)]
    size = min(count, network.family.sampling_batch)  # a batch of few images is not padded
    return sample_latents(network, captions, generators, sampler_of(network.family), on_batch, size)


def denoised(
    network: Network,
    starts: Tensor,
    prompts: Conditioning,
    skipped: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents (n, c, h, w) on the CPU that the network samples for encoded prompts.

    Args:
        network: the model.
        starts: noise (n, c, h, w), or latents noised for the time at which sampling begins.
        prompts: n encoded prompts.
        skipped: steps of the sampler that are left out at the noisy end.
        check: called before each batch; may raise to stop.
    """
    sampler, null, found = sampler_of(network.family), network.encode([""]), []
    for start in range(0, len(starts), network.family.sampling_batch):
        check()
        part = slice(start, start + network.family.sampling_batch)
        solver = network.process.sampler(sampler.steps)
        latents = run_solver(
            network.predict,
            starts[part].to(network.device),
            _Later(solver, skipped),
            prompts[part],
            null,
            sampler.guidance_scale,
        )
        found.append(latents.cpu())
    return torch.cat(found)


class _Later(Solver):
    """A solver that begins after its first steps."""

    def __init__(self, solver: Solver, skipped: int):
        self._solver, self.times = solver, solver.times[skipped:]

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        return self._solver.step(prediction, time, latents)


@dataclass(frozen=True, eq=False)
class Probes:
    """Images, each noised at the same `states` times, with noise of its own at each.

    Every model and prompt is asked at the same noised images, so differences of their errors are of models
    and prompts alone.

    Args:
        noised: noised latents (images * states, c, h, w), image by image.
        times: (images * states,).
        targets: ideal predictions at the noised latents.
        states: number of times.
    """

    noised: Tensor
    times: Tensor
    targets: Tensor
    states: int

    @classmethod
    def of(cls, network: Network, latents: Tensor, states: int, seed: int, purpose: str = "") -> Probes:
        """Probes of latents (n, c, h, w). The times are quantiles of those that training draws."""
        process, count = network.process, len(latents)
        drawn = process.draw_times(1000, generator_for(seed, "audit's times")).sort().values
        times = drawn[[int((i + 0.5) * 1000 / states) for i in range(states)]].repeat(count)
        noise = torch.cat(
            [
                torch.randn(states, *latents.shape[1:], generator=generator_for(seed, "noise", purpose, i))
                for i in range(count)
            ]
        )
        repeated = latents.cpu().repeat_interleave(states, 0)
        parts = process.noised(repeated, noise, times), times, process.target(repeated, noise, times)
        return cls(*(part.to(network.device) for part in parts), states)

    @torch.no_grad()
    def predictions(self, network: Network, prompt: Conditioning | str) -> Tensor:
        """Predictions (images * states, c, h, w) for a prompt, or for encoded ones: one, or one per image."""
        conditioning = network.encode([prompt]) if isinstance(prompt, str) else prompt
        owners = torch.arange(len(self.times), device=conditioning.device) // self.states
        owners = owners % len(conditioning)
        size, found = 2 * network.family.sampling_batch, []
        for start in range(0, len(self.times), size):
            part = slice(start, start + size)
            encoded = conditioning[owners[part]]
            found.append(network.predict(self.noised[part], self.times[part], encoded))
        return torch.cat(found)

    def per_image(self, values: Tensor) -> Tensor:
        """Mean square (images,) of values (images * states, c, h, w), in fp64 on the CPU."""
        squares = values.float().square().flatten(1).mean(1).cpu().double()
        return squares.view(-1, self.states).mean(1)

    def errors(self, network: Network, prompt: Conditioning | str) -> Tensor:
        """Mean square error (images,) of the `predictions`."""
        return self.per_image(self.predictions(network, prompt) - self.targets)

    def gains(
        self, network: Network, prompts: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Prompt -> how much lower (images,) its error is than that of the empty prompt."""
        empty, found = self.errors(network, ""), {}
        for prompt in prompts:
            check()
            found[prompt] = empty - self.errors(network, prompt)
        return found
