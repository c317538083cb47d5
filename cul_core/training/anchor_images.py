"""Anchor images: the pretrained model's samples for the anchor prompts, on which a step trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..base.errors import Cancelled, TrainingError
from ..files.safetensors_format import is_finite
from ..models.network import Network
from ..models.sampling import SamplerConfig, generator_for, sample_latents
from ..models.source import Source


class AnchorSource(Protocol):
    """Provides a step's anchor latents."""

    def anchor_latents(
        self,
        source: Source,
        network: Network,
        prompts: Sequence[str],
        count: int,
        sampler: SamplerConfig,
        seed: int,
        should_stop: Callable[[], bool],
        on_batch: Callable[[int, int], None],
        on_message: Callable[[str], None],
    ) -> Tensor:
        """(count, c, h, w) latents on the CPU, one per prompt; prompts repeat in turn.

        Args:
            source: whose weights sample the latents.
            network: holds the weights of `source`.
            prompts: anchor prompts.
            count: number of latents.
            sampler: how the latents are sampled.
            seed: of the latents.
            should_stop: asked between batches.
            on_batch: called with (latents sampled, `count`) after every batch.
            on_message: called with a sentence for the user, such as what is waited for.

        Raises:
            Cancelled: `should_stop` returned true.
        """


def anchor_generator(seed: int, number: int) -> torch.Generator:
    """CPU generator of the noise of a request's `number`th anchor image."""
    return generator_for(seed, "anchor", number)


def draw_anchors(
    network: Network,
    prompts: Sequence[str],
    count: int,
    sampler: SamplerConfig,
    seed: int,
    should_stop: Callable[[], bool],
    on_batch: Callable[[int, int], None],
    batches: list[Tensor],
) -> None:
    """Sample the anchor latents that `batches` lacks up to `count`, and append them to `batches`.

    The other arguments are those of `AnchorSource.anchor_latents`.

    Raises:
        Cancelled: `should_stop` returned true.
        TrainingError: an image became NaN or infinite.
    """

    def check(done: int) -> None:
        if not is_finite(batches[-1]):
            dtype = str(network.dtype).removeprefix("torch.")
            del batches[-1]
            raise TrainingError(
                f"Anchor picture {done} of {count} became NaN or infinite in {dtype}; choose another "
                "precision, such as bfloat16 or float32."
            )
        on_batch(done, count)
        if should_stop():
            raise Cancelled(f"Cancelled after {done} of {count} anchor images; the input model is unchanged.")

    repeated = [prompts[i % len(prompts)] for i in range(count)]
    generators = [anchor_generator(seed, i) for i in range(count)]
    sample_latents(network, repeated, generators, sampler, check, batches=batches, keeps_text_encoders=False)


class DrawnAnchors:
    """Samples anchor latents anew for every call and stores none."""

    def anchor_latents(
        self,
        source: Source,
        network: Network,
        prompts: Sequence[str],
        count: int,
        sampler: SamplerConfig,
        seed: int,
        should_stop: Callable[[], bool] = lambda: False,
        on_batch: Callable[[int, int], None] = lambda done, count: None,
        on_message: Callable[[str], None] = lambda text: None,
    ) -> Tensor:
        """See `AnchorSource`."""
        batches: list[Tensor] = []
        draw_anchors(network, prompts, count, sampler, seed, should_stop, on_batch, batches)
        return torch.cat(batches)
