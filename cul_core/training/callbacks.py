"""The one training loop: `run_step(model, request)` makes a new `UnlearnModel` and never touches its
input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..models.network import Network
from ..models.sampling import SamplerConfig, generator_for, sample_latents

_PREVIEW_SAMPLER = SamplerConfig(steps=8)


@dataclass(frozen=True)
class Progress:
    """State of a running step, handed to callbacks after every update."""

    iteration: int
    iterations: int
    loss: float
    parts: Mapping[str, float]
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.iteration * (self.iterations - self.iteration)


@dataclass(frozen=True)
class Callbacks:
    """How a caller watches and stops a step. The core itself never prints.

    Args:
        on_progress: called after every update.
        should_stop: asked before every update, anchor batch and prediction of the teacher; true ends the
            step. It may also raise.
        on_anchors: called with (anchor pictures made, their number).
        on_preview: called with (iteration, latents (n, c, h, w) of `preview_prompts` as the model draws them
            now), always from the same noise, before the first update, after every `preview_every` and after
            the last.
        preview_prompts: what previews show.
        preview_every: updates between previews; 0 turns them off.
        on_message: called with a sentence for the user, such as what the step needs, or what is done about
            short memory.
    """

    on_progress: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    on_anchors: Callable[[int, int], None] = lambda done, count: None
    on_preview: Callable[[int, Tensor], None] = lambda iteration, latents: None
    preview_prompts: tuple[str, ...] = ()
    preview_every: int = 0
    on_message: Callable[[str], None] = lambda text: None

    def preview(self, network: Network, iteration: int, iterations: int) -> None:
        """Sample and hand over a preview if it is time for one."""
        if (
            self.preview_every
            and self.preview_prompts
            and (iteration % self.preview_every == 0 or iteration == iterations)
        ):
            generators = [generator_for(0, "preview", i) for i in range(len(self.preview_prompts))]
            batch_size = min(len(generators), network.family.sampling_batch)
            latents = sample_latents(
                network, self.preview_prompts, generators, _PREVIEW_SAMPLER, batch_size=batch_size
            )
            self.on_preview(iteration, latents)
