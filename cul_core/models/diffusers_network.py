"""`DiffusersNetwork`: diffusers' UNet, CLIP text encoders and autoencoder of one checkpoint file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.bounded_cache import BoundedCache
from ..base.errors import ModelError, brief_repr
from .build_diffusers import build_unet
from .family import Family
from .free_memory import release_memory
from .network import Network
from .pruned_decoder import prune_decoder
from .text_conditioning import Conditioning
from .weight_roles import keys_with_role

_CACHED_BYTES = 512 << 20
"""Bytes of encoded prompts kept in memory: 2200 prompts of Stable Diffusion 1.x, 840 of XL."""
_ROOM = 1.5
"""Free GPU memory that the text encoders need to move there, as a multiple of their size."""
_WORD_END = "</w>"


@dataclass
class DiffusersNetwork(Network):
    """UNet, text encoders, tokenizer and autoencoder of one source file, all frozen.

    Args:
        family: family of the file.
        unet: diffusers' UNet.
        text_encoders: in the family's order; empty after `free_text_encoders`, reloaded on the first uncached
            prompt.
        tokenizer: CLIP's tokenizer.
        autoencoder: None for families whose callers decode latents themselves.
        keys: diffusers' name of a UNet parameter -> checkpoint key.
        open_autoencoder: loads the autoencoder for `with_autoencoder`; None if it cannot be loaded.
        open_text_encoders: reloads the text encoders; None if they always stay in memory.
        read_weights: checkpoint keys -> the file's tensors, in fp32 on the CPU.
        file_name: for errors.
        missing_autoencoder: why there is none to open, as a sentence.
    """

    family: Family
    unet: nn.Module
    text_encoders: tuple[nn.Module, ...]
    tokenizer: object
    autoencoder: nn.Module | None
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    open_autoencoder: Callable[[], nn.Module] | None = field(default=None, repr=False)
    open_text_encoders: Callable[[], tuple[nn.Module, ...]] | None = field(default=None, repr=False)
    read_weights: Callable[[Sequence[str]], dict[str, Tensor]] | None = field(default=None, repr=False)
    file_name: str = "the model"
    missing_autoencoder: str = ""
    _prompts: BoundedCache[Conditioning] = field(
        default_factory=lambda: BoundedCache(lambda conditioning: conditioning.nbytes), repr=False
    )
    _decoder: nn.Module | None = field(default=None, repr=False)

    shared_rows = 1
    """CLIP's causal attention gives every prompt the same start token."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def to(self, device: torch.device | str) -> DiffusersNetwork:
        """This network, with UNet and autoencoder moved; text encoders move when they are used."""
        is_cuda = torch.device(device).type == "cuda"  # convolutions are faster with channels last there
        self.unet.to(device, memory_format=torch.channels_last if is_cuda else torch.preserve_format)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        self._prompts.clear()
        self._decoder = None
        return self

    # --- weights

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {self.keys.get(name, name): weight for name, weight in self.unet.named_parameters()}

    def weights(self, role: str) -> dict[str, nn.Parameter]:
        parameters = self._parameters()
        return {key: parameters[key] for key in keys_with_role(self.family, role, parameters)}

    def exact(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Pretrained weights W0 in fp32 by key: the network's own tensors if it is fp32, else the file's."""
        if self.dtype == torch.float32:
            parameters = self._parameters()
            return {key: parameters[key].data for key in keys}
        return self.read_weights(keys)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace the values of these weights within the block, without copies if device and dtype match."""
        parameters = self._parameters()
        originals = {key: parameters[key].data for key in weights}
        try:
            for key, weight in weights.items():
                parameters[key].data = weight.to(originals[key].device, originals[key].dtype)
            yield
        finally:
            for key, weight in originals.items():
                parameters[key].data = weight

    # --- text

    @property
    def _length(self) -> int:
        return self.family.config("text_encoder")["max_position_embeddings"]

    def free_text_encoders(self) -> None:
        if self.open_text_encoders is not None and self.text_encoders:
            self.text_encoders = ()
            release_memory(torch.device("cpu"))

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Conditioning:
        """Encoded prompts on the network's device; with `grad`, uncached and with gradients.

        The most recently used prompts stay cached on the CPU, up to `_CACHED_BYTES`.
        """
        if grad:
            device = self._place_text_encoders()
            return self._encode(self.token_ids(prompts).to(device)).to(self.device)
        missing = sorted(prompt for prompt in set(prompts) if prompt not in self._prompts)
        if missing:
            device = self._place_text_encoders()
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            with torch.no_grad():
                encoded = self._encode(self.token_ids(part).to(device)).to("cpu")
            for prompt, conditioning in zip(part, encoded, strict=True):
                self._check_encoded(prompt, conditioning)
                self._prompts.put(prompt, conditioning)
        encoded = {prompt: self._prompts.get(prompt) for prompt in dict.fromkeys(prompts)}
        batch = Conditioning.cat(encoded[prompt] for prompt in prompts).to(self.device)
        self._prompts.shrink(_CACHED_BYTES)
        return batch

    def _check_encoded(self, prompt: str, conditioning: Conditioning) -> None:
        """Raises ModelError for an encoded prompt that is not finite, as a damaged word's row makes it."""
        if not conditioning.text.isfinite().all():
            raise ModelError(
                f"{self.file_name!r} is damaged: 'token_embedding.weight' holds NaN or infinite values for "
                f"a word of {brief_repr(prompt)}; choose another checkpoint."
            )

    def token_rows(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        device = self._place_text_encoders()
        ids = self.token_ids(prompts).to(device)
        embeddings = [encoder.get_input_embeddings() for encoder in self.text_encoders]
        kinds = self.family.text_encoders
        with torch.no_grad():
            return tuple(rows(self._own_ids(kind, ids)) for kind, rows in zip(kinds, embeddings, strict=True))

    def encode_rows(self, prompts: Sequence[str], rows: Sequence[Tensor]) -> Conditioning:
        device = self._place_text_encoders()
        with ExitStack() as hooks:
            for encoder, own_rows in zip(self.text_encoders, rows, strict=True):
                handle = encoder.get_input_embeddings().register_forward_hook(
                    lambda module, inputs, output, own_rows=own_rows: own_rows.to(output)
                )
                hooks.callback(handle.remove)
            return self._encode(self.token_ids(prompts).to(device)).to(self.device)

    def _place_text_encoders(self) -> torch.device:
        """The text encoders' device: the UNet's if its memory suffices; reloads freed text encoders."""
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

    def _own_ids(self, kind: object, ids: Tensor) -> Tensor:
        """Token ids (b, n) with the padding that this text encoder was trained with."""
        after_end = (ids == self.tokenizer.eos_token_id).cumsum(1) > 1
        return ids.masked_fill(after_end, 0) if kind.pads_with_zero else ids

    def _encode(self, ids: Tensor) -> Conditioning:
        rows, pooled = [], None
        for kind, encoder in zip(self.family.text_encoders, self.text_encoders, strict=True):
            output = encoder(input_ids=self._own_ids(kind, ids), output_hidden_states=kind.skips_last)
            rows.append(output.hidden_states[-2] if kind.skips_last else output.last_hidden_state)
            if kind.is_pooled:
                pooled = output.text_embeds
        return Conditioning(torch.cat(rows, -1), pooled)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (b, n): start token, text, EOS, and EOS padding."""
        padded = {"padding": "max_length", "max_length": self._length, "truncation": True}
        return self.tokenizer(list(prompts), **padded, return_tensors="pt").input_ids

    def content(self, prompt: str) -> slice:
        return slice(1, len(self.tokens(prompt)) + 1)

    def tokens(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt, max_length=self._length, truncation=True).input_ids[1:-1])

    def words(self, least_letters: int = 3) -> list[str]:
        whole = re.compile(rf"[a-z]{{{least_letters},}}{_WORD_END}")
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [token.removesuffix(_WORD_END) for token, _ in vocabulary if whole.fullmatch(token)]
        return [word for word in words if word not in self.withheld_words]

    # --- prediction

    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        added, dtype = None, self.dtype
        if conditioning.pooled is not None:
            size = self.family.image_size_px
            sizes = torch.tensor([size, size, 0, 0, size, size], dtype=latents.dtype, device=latents.device)
            time_ids = sizes.expand(len(latents), -1)
            added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": time_ids}
        text = conditioning.text.to(dtype)
        output = self.unet(latents.to(dtype), times, encoder_hidden_states=text, added_cond_kwargs=added)
        return output.sample.to(latents.dtype)

    def text_readers(self) -> list[nn.Module]:
        keys = set(self.weights("text_readers"))
        modules = self.unet.named_modules()
        return [
            module for name, module in modules if self.keys.get(f"{name}.weight", f"{name}.weight") in keys
        ]

    # --- memory and speed

    def set_checkpointing(self, is_on: bool, checkpoint: Callable[..., object] | None = None) -> None:
        if not is_on:
            self.unet.disable_gradient_checkpointing()
        elif checkpoint is None:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.enable_gradient_checkpointing(checkpoint)

    def set_compiled(self, is_on: bool) -> None:
        if is_on:
            self.unet.compile()
        else:
            self.unet._compiled_call_impl = None

    @property
    def is_compiled(self) -> bool:
        return self.unet._compiled_call_impl is not None

    def blank(self, dtype: torch.dtype) -> DiffusersNetwork:
        unet = build_unet(self.family).requires_grad_(False)
        for weight in unet.parameters():
            weight.data = weight.data.to(dtype)
        return DiffusersNetwork(self.family, unet, (), None, None, self.keys)

    def inputs(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        def empty(*shape: int, **kwargs: torch.dtype) -> Tensor:
            return torch.empty(count, *shape, device=self.device, **kwargs)

        widths = [kind for kind in self.family.text_encoders if kind.is_pooled]
        pooled = [empty(self.family.config(kind.config)["projection_dim"]) for kind in widths]
        text = empty(self._length, self.unet.config.cross_attention_dim)
        conditioning = Conditioning(text, pooled[0] if pooled else None)
        return empty(*self.family.latent_shape), empty(dtype=torch.long), conditioning

    # --- images

    def check_autoencoder(self) -> None:
        if self.autoencoder is None and self.open_autoencoder is None:
            raise ModelError(
                self.missing_autoencoder
                or f"{self.family.display_name} is loaded here without an autoencoder, so no image can be "
                "decoded or encoded; turn off the settings that need images, such as augmentations and flip."
            )

    @contextmanager
    def with_autoencoder(self) -> Iterator[None]:
        """Make `decode` and `encode_images` available within the block, loading the autoencoder if needed."""
        if self.autoencoder is not None:
            yield
            return
        self.check_autoencoder()
        self.autoencoder = self.open_autoencoder().to(self.device)
        try:
            yield
        finally:
            self.autoencoder = None

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (b, c, h, w) of images (b, 3, h, w) in [0, 1]; of a VAE, a sample of its posterior."""
        encoded = self.autoencoder.encode(images * 2 - 1)
        latents = encoded.latents if self.family.has_decoder else encoded.latent_dist.sample(generator)
        return latents * self.family.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self.autoencoder is None:
            raise ModelError(
                f"Latents of {self.family.display_name} cannot be decoded here, because its autoencoder is "
                "not loaded; decode them with the VAE of the program that shows the images."
            )
        if not self.family.has_decoder:
            images = self.autoencoder.decode(latents / self.family.latent_scale).sample
            return images.div(2).add(0.5).clamp(0, 1)
        if self._decoder is None:
            decoder = prune_decoder(self.autoencoder.decoder.layers)
            self._decoder = decoder.to(memory_format=torch.channels_last)
        clamped = 3 * (latents / self.family.latent_scale / 3).tanh()
        return self._decoder(clamped).clamp(0, 1)
