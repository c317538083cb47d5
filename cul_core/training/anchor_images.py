"""Anchor images: what a step trains on, as the pretrained model draws the anchor prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..base.errors import Cancelled
from ..models.network import Network
from ..models.sampling import SamplerConfig, generator_for, sample_latents
from ..models.source import Source


class AnchorSource(Protocol):
    """Where a step gets its anchor latents from."""

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
    ) -> Tensor:
        """(count, c, h, w) latents on the CPU, by the weights of `source`, which `network` holds; prompts
        repeat in turn. Raises Cancelled when `should_stop` says so."""


def anchor_generator(seed: int, number: int) -> torch.Generator:
    """Where the noise of a request's anchor image comes from."""
    return generator_for(seed, "anchor", number)


def draw_anchors(
    network: Network,
    prompts: Sequence[str],
    count: int,
    sampler: SamplerConfig,
    seed: int,
    check: Callable[[int], None],
    batches: list[Tensor],
) -> None:
    """Append what is missing of `count` anchor latents to `batches`; `check(done)` runs after each batch and
    may raise to stop."""
    repeated = [prompts[i % len(prompts)] for i in range(count)]
    generators = [anchor_generator(seed, i) for i in range(count)]
    sample_latents(network, repeated, generators, sampler, check, batches=batches, keeps_text_encoders=False)


class DrawnAnchors:
    """Anchors that are drawn for the one who asks and kept nowhere."""

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
    ) -> Tensor:
        """See `AnchorSource`."""

        def check(done: int) -> None:
            on_batch(done, count)
            if should_stop():
                raise Cancelled(
                    f"Cancelled after {done} of {count} anchor pictures; the input model is unchanged."
                )

        batches: list[Tensor] = []
        draw_anchors(network, prompts, count, sampler, seed, check, batches)
        return torch.cat(batches)
