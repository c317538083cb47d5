"""Anchor latents: pictures of the anchor prompts as the pretrained model draws them, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from .bundle import ModelBundle
from .config import stable_hash
from .diffusion import SamplerConfig, generator_for, sample_latents
from .errors import Cancelled
from .loading import Source
from .safetensor_files import opened, write_atomically


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
            if path is not None and path.is_file():
                with opened(path) as file:
                    self._memory[key] = file.get_tensor("latents")
            else:

                def check(done: int) -> None:
                    on_batch(done, count)
                    if should_stop():
                        raise Cancelled(f"Cancelled after {done} of {count} anchor pictures; the input model is unchanged.")

                repeated = [prompts[i % len(prompts)] for i in range(count)]
                generators = [generator_for(seed, "anchor", i) for i in range(count)]
                self._memory[key] = sample_latents(bundle, repeated, generators, sampler, check)
                if path is not None:
                    data = save({"latents": self._memory[key]})
                    write_atomically(path, lambda file: file.write(data))
        return self._memory[key]
