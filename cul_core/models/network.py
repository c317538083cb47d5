"""The contract between the core and a model: `Network`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from .family import Family
from .noise_process import NoiseProcess
from .text_conditioning import Conditioning


class Network(ABC):
    """All that the core may ask of a text-to-image model. Its weights are frozen; it is not a value.

    A weight is called by its checkpoint key. `shared_rows` is the number of leading text rows that are the
    same for every prompt, such as CLIP's start token.
    """

    family: Family
    shared_rows: int = 0

    @property
    def process(self) -> NoiseProcess:
        """How its images become noise, and what it predicts."""
        return self.family.process

    # --- weights

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @abstractmethod
    def weights(self, role: str) -> dict[str, nn.Parameter]:
        """Checkpoint key -> parameter, in the network's order, of all weights with a role.

        Raises:
            ConfigError: the role is unknown, or no weight has it.
        """

    @abstractmethod
    def exact(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """W0 of these weights in fp32, never rounded to what the network computes in."""

    @abstractmethod
    def with_weights(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within the block these weights hold other values.

        Never enter it between a prediction with gradients and its backward pass.
        """

    # --- text

    @abstractmethod
    def encode(self, prompts: Sequence[str], grad: bool = False) -> Conditioning:
        """The prompts as the network reads them, on its device; with `grad` nothing is cached, and gradients
        flow."""

    @abstractmethod
    def token_rows(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Input embeddings (b, n, e) of the prompts' tokens, one tensor for each text encoder."""

    @abstractmethod
    def encode_rows(self, prompts: Sequence[str], rows: Sequence[Tensor]) -> Conditioning:
        """The prompts encoded from `rows` in the place of their `token_rows`; gradients flow to the rows."""

    @abstractmethod
    def content(self, prompt: str) -> slice:
        """Which text rows are the prompt's own tokens; the row after them ends the text."""

    @abstractmethod
    def words(self, least_letters: int = 3) -> list[str]:
        """Whole lower-case words that are one token, in the vocabulary's order."""

    def token_count(self, prompt: str) -> int:
        """Number of the prompt's own tokens."""
        content = self.content(prompt)
        return content.stop - content.start

    def free_text_encoders(self) -> None:
        """Give back their memory, where they can be loaded again."""
        return None

    # --- prediction

    @abstractmethod
    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw prediction (b, c, h, w) for latents (b, c, h, w) at times (b,) or (), in the latents' dtype."""

    @contextmanager
    def shared_rows_detached(self) -> Iterator[None]:
        """Within the block no gradient reaches the text readers through the `shared_rows`."""
        if not self.shared_rows:
            yield
            return
        count = self.shared_rows

        def detach(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.cat([output[:, :count].detach(), output[:, count:]], dim=1)

        handles = [module.register_forward_hook(detach) for module in self.text_readers()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @abstractmethod
    def text_readers(self) -> list[nn.Module]:
        """The layers whose inputs are text rows."""

    # --- memory and speed

    def set_checkpointing(self, is_on: bool, checkpoint: Callable[..., object] | None = None) -> None:
        """Recompute activations in the backward pass, by PyTorch's checkpointing or by a function like it."""
        return None

    def set_compiled(self, is_on: bool) -> None:
        """Compile the forward pass, or go back to the plain one."""
        return None

    @property
    def is_compiled(self) -> bool:
        return False

    def blank(self, dtype: torch.dtype) -> Network | None:
        """The same architecture without values, on the meta device, to count with; None if there is no such
        thing."""
        return None

    def inputs(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        """What `predict` takes for `count` images, without values, on this network's device."""
        raise NotImplementedError

    # --- images

    def with_autoencoder(self) -> AbstractContextManager[None]:
        """Within the block latents can be decoded and images encoded.

        Raises:
            ModelError: there is no autoencoder.
        """
        raise ModelError(
            f"{self.family.display_name} is loaded here without an autoencoder; decode elsewhere."
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] of latents (b, c, h, w).

        Raises:
            ModelError: there is no autoencoder, or this is not within `with_autoencoder`.
        """
        raise ModelError(
            f"Latents of {self.family.display_name} cannot be decoded here; decode them elsewhere."
        )

    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (b, c, h, w) of images (b, 3, h, w) in [0, 1].

        Raises:
            ModelError: there is no autoencoder, or this is not within `with_autoencoder`.
        """
        raise ModelError(f"Images cannot be encoded for {self.family.display_name} here; leave them out.")
