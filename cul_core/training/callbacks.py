"""Callbacks by which a caller watches and stops a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..models.network import Network
from ..models.sampling import generator_for, sample_latents
from ..requests.previews import PREVIEW_SAMPLER


@dataclass(frozen=True)
class Progress:
    """Progress of a running step, passed to callbacks after every update.

    Args:
        iteration: updates done.
        iterations: updates of the whole step.
        loss: total loss of the last update.
        terms: value of each named term of the loss.
        seconds: time the updates have taken, in earlier runs too.
    """

    iteration: int
    iterations: int
    loss: float
    terms: Mapping[str, float]
    seconds: float

    @property
    def seconds_left(self) -> float:
        """Estimated time of the remaining updates, from the mean so far."""
        return self.seconds / self.iteration * (self.iterations - self.iteration)


@dataclass(frozen=True)
class Callbacks:
    """How a caller watches and stops a step. The core itself never prints.

    Args:
        on_progress: called after every update.
        should_stop: asked before every update, anchor batch and teacher prediction; true ends the step. It
            may also raise.
        on_anchors: called with (anchor images sampled, their number).
        on_preview: called with (iteration, latents (n, c, h, w) of `preview_prompts` by the current weights,
            always from the same noise): before the first update, every `preview_every` updates and after the
            last.
        preview_prompts: prompts of the preview images.
        preview_every: updates between previews; 0 turns them off.
        on_message: called with a sentence for the user, such as the step's estimate, or how it saves memory.
        on_stage: called with what a closed-form method is doing, such as 'reading sentence 64 of 1200'.
    """

    on_progress: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    on_anchors: Callable[[int, int], None] = lambda done, count: None
    on_preview: Callable[[int, Tensor], None] = lambda iteration, latents: None
    preview_prompts: tuple[str, ...] = ()
    preview_every: int = 0
    on_message: Callable[[str], None] = lambda text: None
    on_stage: Callable[[str], None] = lambda text: None

    def preview(self, network: Network, iteration: int, iterations: int) -> None:
        """Sample a preview and pass it to `on_preview`, if one is due."""
        if (
            self.preview_every
            and self.preview_prompts
            and (iteration % self.preview_every == 0 or iteration == iterations)
        ):
            generators = [generator_for(0, "preview", i) for i in range(len(self.preview_prompts))]
            batch_size = min(len(generators), network.family.sampling_batch)
            latents = sample_latents(
                network, self.preview_prompts, generators, PREVIEW_SAMPLER, batch_size=batch_size
            )
            self.on_preview(iteration, latents)
