"""Anchor latents: pictures of the anchor prompts as the pretrained model draws them, made once and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .bundle import ModelBundle
from .config import stable_hash
from .diffusion import SamplerConfig, generator_for, sample_latents
from .errors import Cancelled, CheckpointError, ModelError
from .loading import Source
from .safetensor_files import opened, write_atomically

logger = logging.getLogger(__name__)


def anchor_generator(seed: int, number: int) -> torch.Generator:
    """Where the noise of a request's anchor picture comes from."""
    return generator_for(seed, "anchor", number)


class AnchorStore:
    """Content-addressed anchor latents, in memory and, when a folder is given, on disk. Safe to delete at any time."""

    def __init__(self, folder: Path | str | None = None):
        self._folder = Path(folder) if folder is not None else None
        self._memory: dict[str, Tensor] = {}

    def anchor_latents(
        self, source: Source, bundle: ModelBundle, prompts: Sequence[str], count: int, sampler: SamplerConfig, seed: int,
        should_stop: Callable[[], bool] = lambda: False, on_batch: Callable[[int, int], None] = lambda done, count: None,
    ) -> Tensor:  # fmt: skip
        """(count, c, h, w) latents on the CPU, always by the weights of `source`; prompts repeat in turn.

        `bundle` must hold those weights. `on_batch(done, count)` runs after each batch that is sampled. Raises Cancelled when
        `should_stop` says so.
        """
        key = stable_hash([source.sha256, list(prompts), count, sampler.to_json(), seed, "anchors-1"])
        if key not in self._memory:
            path = self._folder / f"anchors-{key[:32]}.safetensors" if self._folder else None
            kept = _read(path) if path is not None else None
            if kept is None:

                def check(done: int) -> None:
                    on_batch(done, count)
                    if should_stop():
                        raise Cancelled(f"Cancelled after {done} of {count} anchor pictures; the input model is unchanged.")

                repeated = [prompts[i % len(prompts)] for i in range(count)]
                generators = [anchor_generator(seed, i) for i in range(count)]
                kept = sample_latents(bundle, repeated, generators, sampler, check)
                if path is not None:
                    _write(path, kept)
            self._memory[key] = kept
        return self._memory[key]


def _read(path: Path) -> Tensor | None:
    """The latents in a file; None if there is none, or if it is damaged (it is removed then)."""
    if not path.is_file():
        return None
    try:
        with opened(path) as file:
            return file.get_tensor("latents")
    except ModelError as error:
        logger.warning("stored anchor pictures are damaged and are drawn again: %s", error)
        path.unlink(missing_ok=True)
        return None


def _write(path: Path, latents: Tensor) -> None:
    data = save({"latents": latents})
    try:
        write_atomically(path, lambda file: file.write(data))
    except CheckpointError as error:  # they can be drawn again; the step must not fail for that
        logger.warning("anchor pictures are not kept for later steps: %s", error)
