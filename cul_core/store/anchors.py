"""Store of anchor latents, which the pretrained model samples once for the anchor prompts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..base.bounded_cache import BoundedCache
from ..base.config import stable_hash
from ..base.errors import Cancelled, CheckpointError, ModelError
from ..files.atomic_write import leftovers
from ..files.locks import Waiting, lock_of, locked
from ..files.safetensors_format import is_finite, read_sealed, write_sealed
from ..models.free_memory import release_memory
from ..models.network import Network
from ..models.sampling import SamplerConfig
from ..models.source import Source
from ..training.anchor_images import draw_anchors

logger = logging.getLogger(__name__)
_MEMORY_BYTES = 512 << 20
"""Bound on anchor latents in memory: ten sets of 200 images of Stable Diffusion XL."""


class AnchorStore:
    """Content-addressed anchor latents, in memory and, with a folder, on disk.

    Memory holds the most recently used sets, of at most `_MEMORY_BYTES`; other sets are read from disk again.
    A file may hold an unfinished set: the next run continues after its last latent. Deleting the folder is
    always safe.

    Args:
        folder: of the files; created on the first write.
        locks: folder of lock files; of several processes that need the same set, only one samples it.
        every_seconds: time between writes of an unfinished set.
    """

    def __init__(
        self, folder: Path | str | None = None, locks: Path | None = None, every_seconds: float = 10.0
    ):
        self._folder, self._locks, self._every = (
            Path(folder) if folder is not None else None,
            locks,
            every_seconds,
        )
        self._memory: BoundedCache[Tensor] = BoundedCache(lambda latents: latents.nbytes)
        self.used: set[Path] = set()

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
        """(count, c, h, w) latents on the CPU, sampled with the weights of `source`; see `AnchorSource`.

        Raises:
            Cancelled: `should_stop` returned true.
        """
        key = stable_hash([source.identity, list(prompts), count, sampler.to_json(), seed, "anchors-2"])
        latents = self._memory.get(key)
        if latents is None:
            file = (
                _AnchorFile(self._folder / f"anchors-{key[:32]}.safetensors", self._every)
                if self._folder
                else None
            )

            def on_drawn(done: int, count: int) -> None:
                on_batch(done, count)
                if file is not None:
                    file.offer(batches)

            waiting = Waiting("Another process draws the anchor pictures", on_message)

            def wait() -> None:
                waiting()
                if should_stop():
                    raise Cancelled(
                        "Cancelled while another process draws the anchor images; the input model is "
                        "unchanged."
                    )

            with locked(lock_of(self._locks, file.path), wait) if file and self._locks else nullcontext():
                batches = file.read(count) if file is not None else []
                if sum(map(len, batches)) < count:
                    try:
                        draw_anchors(network, prompts, count, sampler, seed, should_stop, on_drawn, batches)
                    finally:
                        if file is not None:
                            file.write(batches)
                    release_memory(network.device)
            latents = torch.cat(batches)
            self._memory.put(key, latents)
            self._memory.shrink(_MEMORY_BYTES)
            if file is not None:
                self.used.add(file.path)
        return latents


class _AnchorFile:
    """The file of one set of anchor latents. A read or write error never fails a step: it samples again."""

    def __init__(self, path: Path, every_seconds: float):
        self.path, self._every = path, every_seconds
        self._written, self._due = 0, time.monotonic() + every_seconds

    def read(self, count: int) -> list[Tensor]:
        """The latents in the file as one batch; no batch if there is no file. A damaged file is removed."""
        with suppress(OSError):
            for path in leftovers(self.path.parent, self.path.stem):
                path.unlink()
        if not self.path.is_file():
            return []
        try:
            latents = read_sealed(self.path)[0]["latents"]
            if not is_finite(latents):
                raise CheckpointError(f"{self.path.name!r} holds values that are not finite; remove it.")
        except (ModelError, CheckpointError, KeyError) as error:
            logger.warning("stored anchor images are damaged and are drawn again: %s", error)
            with suppress(OSError):
                self.path.unlink()
            return []
        self._written = len(latents)
        if self._written < count:
            logger.info("went on after %d of %d anchor images", self._written, count)
        return [latents]

    def offer(self, batches: Sequence[Tensor]) -> None:
        """Write the latents if a write is due."""
        if time.monotonic() >= self._due:
            self.write(batches)
            self._due = time.monotonic() + self._every

    def write(self, batches: Sequence[Tensor]) -> None:
        """Write the latents, unless the file has as many."""
        if (count := sum(map(len, batches))) in (0, self._written):
            return
        try:
            write_sealed(self.path, {"latents": torch.cat(list(batches))}, {})
            self._written = count
        except CheckpointError as error:
            logger.warning("anchor images are not kept for later steps: %s", error)
