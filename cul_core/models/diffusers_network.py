"""The heavy parts of a model, loaded on demand, and the ways other modules may touch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from .family import Family
from .free_memory import release_memory
from .pruned_decoder import prune_decoder
from .text_conditioning import Conditioning

_CACHED_PROMPTS = 1024
_ROOM = 1.5


@dataclass
class DiffusersNetwork:
    """UNet, text encoders, tokenizer and autoencoder of one source file, all frozen. Not a value: nodes never
    pass it on.

    `text_encoders` are in the order of the family's; none after `free_text_encoders`, until
    `open_text_encoders` loads them for a prompt that is not known yet. `autoencoder` is None for families
    whose callers decode latents themselves; `open_autoencoder` then loads it for `with_autoencoder`, if there
    is a way to. `read_weights` gives tensors of the UNet by name in fp32, on the CPU, as the file has them,
    whatever the UNet's own dtype.
    """

    family: Family
    unet: nn.Module
    text_encoders: tuple[nn.Module, ...]
    tokenizer: object
    autoencoder: nn.Module | None
    open_autoencoder: Callable[[], nn.Module] | None = field(default=None, repr=False)
    open_text_encoders: Callable[[], tuple[nn.Module, ...]] | None = field(default=None, repr=False)
    read_weights: Callable[[Sequence[str]], dict[str, Tensor]] | None = field(default=None, repr=False)
    _prompts: dict[str, Conditioning] = field(default_factory=dict, repr=False)
    _decoder: nn.Module | None = field(default=None, repr=False)
    _scores: tuple[str, dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return next(self.unet.parameters()).dtype

    def to(self, device: torch.device | str) -> DiffusersNetwork:
        """Moves the UNet and the autoencoder, and returns itself; the text encoders follow for the next
        prompts, if there is room."""
        # where convolutions gain by it
        layout = torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format
        self.unet.to(device, memory_format=layout)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        self._prompts.clear()
        self._decoder = self._scores = None
        return self

    def exact(self, names: Sequence[str]) -> dict[str, Tensor]:
        """W0 of these parameters in fp32, never rounded to what the UNet computes in; its own tensors where
        it has them so."""
        if self.dtype == torch.float32:
            parameters = dict(self.unet.named_parameters())
            return {name: parameters[name].data for name in names}
        return self.read_weights(names)

    def free_text_encoders(self) -> None:
        """Gives the memory of the text encoders back, where they can be loaded again."""
        if self.open_text_encoders is not None and self.text_encoders:
            self.text_encoders = ()
            release_memory(torch.device("cpu"))

    def scores(self, key: str, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Scores of weights by name, from `measure` unless the last ones were those of `key` too; only the
        last are kept."""
        if self._scores is None or self._scores[0] != key:
            self._scores = None  # frees the old ones before the new ones are made
            self._scores = (key, measure())
        return self._scores[1]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts as the family's text encoders see them (see `families.TextEncoder`), on the device.
        Each distinct prompt is encoded once; of more than `_CACHED_PROMPTS` the least recently asked for are
        forgotten, never those of this call."""
        missing = sorted(set(prompts) - self._prompts.keys())
        if missing:
            device = self._place_text_encoders()
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            self._prompts.update(
                zip(part, self._encode(self.token_ids(part).to(device)).to("cpu"), strict=True)
            )
        for prompt in dict.fromkeys(prompts):
            self._prompts[prompt] = self._prompts.pop(prompt)
        encoded = Conditioning.cat(self._prompts[prompt] for prompt in prompts).to(self.device)
        for prompt in list(self._prompts)[: -max(_CACHED_PROMPTS, len(set(prompts)))]:
            del self._prompts[prompt]
        return encoded

    def _place_text_encoders(self) -> torch.device:
        """Loads them if they are not there; the device that they are on, which is the UNet's if there is room
        for them."""
        if not self.text_encoders and self.open_text_encoders is not None:
            self.text_encoders = self.open_text_encoders()
        parameters = [parameter for encoder in self.text_encoders for parameter in encoder.parameters()]
        device = self.device
        if device.type == "cuda" and parameters[0].device != device:
            needed = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
            if torch.cuda.mem_get_info(device)[0] < _ROOM * needed:
                device = torch.device("cpu")
        for encoder in self.text_encoders:
            encoder.to(device)
        return device

    def _encode(self, ids: Tensor) -> Conditioning:
        rows, pooled = [], None
        after_end = (ids == self.tokenizer.eos_token_id).cumsum(1) > 1
        for kind, encoder in zip(self.family.text_encoders, self.text_encoders, strict=True):
            own_ids = ids.masked_fill(after_end, 0) if kind.pads_with_zero else ids
            output = encoder(input_ids=own_ids, output_hidden_states=kind.skips_last)
            rows.append(output.hidden_states[-2] if kind.skips_last else output.last_hidden_state)
            if kind.is_pooled:
                pooled = output.text_embeds
        return Conditioning(torch.cat(rows, -1), pooled)

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Conditioning) -> Tensor:
        """Raw output (b, c, h, w) of the UNet for (b, c, h, w) latents at timesteps (b,) or (): the one way
        in which it is called.

        It computes in its own dtype; what goes in and comes out is of the latents' dtype.
        """
        added, dtype = None, self.dtype
        if embeddings.pooled is not None:
            size = self.family.image_size_px
            time_ids = torch.tensor(
                [size, size, 0, 0, size, size], dtype=latents.dtype, device=latents.device
            )
            added = {
                "text_embeds": embeddings.pooled.to(dtype),
                "time_ids": time_ids.expand(len(latents), -1),
            }
        said = self.unet(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=embeddings.text.to(dtype),
            added_cond_kwargs=added,
        )
        return said.sample.to(latents.dtype)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (b, 77), start, text, end, padded with the end token."""
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids

    def token_count(self, prompt: str) -> int:
        """Number of content tokens: without start, end and padding."""
        return len(self.tokenizer(prompt, max_length=77, truncation=True).input_ids) - 2

    @contextmanager
    def with_autoencoder(self) -> Iterator[None]:
        """Within the block latents can be decoded and pictures encoded. An autoencoder that is loaded for
        that is freed at the end.

        Raises:
            ModelError: there is none to load, or its file does not hold it.
        """
        if self.autoencoder is not None:
            yield
            return
        if self.open_autoencoder is None:
            raise ModelError(
                f"{self.family.display_name} is loaded here without an autoencoder, so that no picture can "
                "be decoded or encoded; turn off what works on pictures, such as augmentations and flip."
            )
        self.autoencoder = self.open_autoencoder().to(self.device)
        try:
            yield
        finally:
            self.autoencoder = None

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Model-space latents (b, c, h, w) of pictures (b, 3, h, w) in [0, 1]; a sample of the posterior
        where the encoder gives one."""
        encoded = self.autoencoder.encode(pictures * 2 - 1)
        latents = encoded.latents if self.family.has_decoder else encoded.latent_dist.sample(generator)
        return latents * self.family.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [0, 1] of model-space latents (b, c, h, w).

        Raises:
            ModelError: the family is loaded without its autoencoder, and this is not within
            `with_autoencoder`.
        """
        if self.autoencoder is None:
            raise ModelError(
                f"Latents of {self.family.display_name} cannot be decoded here, because its autoencoder is "
                "not loaded; decode them with the VAE of the program that shows the pictures."
            )
        if not self.family.has_decoder:
            return (
                self.autoencoder.decode(latents / self.family.latent_scale).sample.div(2).add(0.5).clamp(0, 1)
            )
        if self._decoder is None:
            self._decoder = prune_decoder(self.autoencoder.decoder.layers).to(
                memory_format=torch.channels_last
            )
        clamped = 3 * (latents / self.family.latent_scale / 3).tanh()
        return self._decoder(clamped).clamp(0, 1)


@contextmanager
def swapped_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the named parameters of `module` are `weights`; the storages are exchanged, nothing is
    copied, unless weights are elsewhere or of another dtype than the module computes in: then of copies.

    Never exchange between a student's forward and its backward: autograd would see changed tensors.
    """
    parameters = dict(module.named_parameters())
    kept = {name: parameters[name].data for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight.to(kept[name].device, kept[name].dtype)
        yield
    finally:
        for name, weight in kept.items():
            parameters[name].data = weight
