"""`Network`, the interface through which the core uses a text-to-image model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from ..base.last_result import LastResult
from .family import Family
from .noise_process import NoiseProcess
from .source import Source
from .text_conditioning import Conditioning


class Network(ABC):
    """A text-to-image model with frozen weights, as the core uses it; stateful, so never a node's output.

    Weights are named by checkpoint key. `shared_rows` is the number of leading text rows that are the same
    for every prompt, such as that of CLIP's start token. `withheld_words` are left out of `words`, from which
    methods make up names: a benchmark hides them.
    """

    family: Family
    shared_rows: int = 0
    withheld_words: frozenset[str] = frozenset()

    @property
    def process(self) -> NoiseProcess:
        """Noise process, including what the network predicts."""
        return self.family.process

    # --- weights

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the network's weights."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""

    @abstractmethod
    def weights(self, role: str) -> dict[str, nn.Parameter]:
        """Checkpoint key -> parameter of all weights with a role, in the network's order.

        Its value is that of `with_weights`; outside, only its shape and dtype mean anything, see `exact`.

        Raises:
            ConfigError: the role is unknown, or no weight has it.
        """

    @abstractmethod
    def exact(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Pretrained weights W0 in fp32 by key, exact even if the network computes in a lower precision."""

    @abstractmethod
    def with_weights(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Replace the values of these weights within the block.

        The block must not begin or end between a prediction with gradients and its backward pass.
        """

    # --- text

    @abstractmethod
    def encode(self, prompts: Sequence[str], grad: bool = False) -> Conditioning:
        """Encoded prompts on the network's device; with `grad`, uncached and with gradients."""

    def rows_read(self, rows: Tensor) -> Tensor:
        """Text rows (..., d) as text readers get them: the same, unless a norm is in between."""
        return rows

    @abstractmethod
    def token_rows(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Input token embeddings (b, n, e) of the prompts, one tensor for each text encoder."""

    @abstractmethod
    def encode_rows(self, prompts: Sequence[str], rows: Sequence[Tensor]) -> Conditioning:
        """Prompts encoded from given token embeddings instead of their `token_rows`, with gradients."""

    @abstractmethod
    def content(self, prompt: str) -> slice:
        """Slice of the text rows that are the prompt's own tokens; the next row is that of EOS."""

    @abstractmethod
    def tokens(self, prompt: str) -> tuple[int, ...]:
        """Token ids of the prompt's own tokens, those at `content`."""

    @abstractmethod
    def words(self, least_letters: int = 3) -> list[str]:
        """Lower-case words that are a single token, in the vocabulary's order, without `withheld_words`."""

    def token_count(self, prompt: str) -> int:
        """Number of the prompt's own tokens."""
        return len(self.tokens(prompt))

    def free_text_encoders(self) -> None:
        """Free the text encoders' memory if they can be reloaded."""
        return None

    # --- prediction

    @abstractmethod
    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw prediction (b, c, h, w) in the latents' dtype, for latents (b, c, h, w) at times (b,) or ()."""

    @contextmanager
    def shared_rows_detached(self) -> Iterator[None]:
        """Detach the text readers' outputs for the `shared_rows` within the block."""
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
        """Layers whose inputs are text rows, such as cross-attention's key and value projections."""

    # --- memory and speed

    def set_checkpointing(self, is_on: bool, checkpoint: Callable[..., object] | None = None) -> None:
        """Switch activation checkpointing, by PyTorch's function or by one of the same signature."""
        return None

    def set_compiled(self, is_on: bool) -> None:
        """Switch compilation of the forward pass."""
        return None

    @property
    def is_compiled(self) -> bool:
        """Whether the forward pass is compiled."""
        return False

    def blank(self, dtype: torch.dtype) -> Network | None:
        """The same architecture on the meta device, for memory estimates; None if it cannot be built."""
        return None

    def inputs(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Uninitialized inputs (latents, times, conditioning) of `predict` for `count` images."""
        raise NotImplementedError

    # --- images

    def check_autoencoder(self) -> None:
        """Check that `with_autoencoder` can be entered, before images are sampled.

        Raises:
            ModelError: it cannot.
        """
        with self.with_autoencoder():
            pass

    def with_autoencoder(self) -> AbstractContextManager[None]:
        """Make `decode` and `encode_images` available within the block.

        Raises:
            ModelError: the network has no autoencoder.
        """
        raise ModelError(
            f"{self.family.display_name} is loaded without an autoencoder; decode its latents with a VAE."
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] decoded from latents (b, c, h, w).

        Raises:
            ModelError: the network has no autoencoder, or the call is outside `with_autoencoder`.
        """
        raise ModelError(
            f"{self.family.display_name} is loaded without an autoencoder; decode its latents with a VAE."
        )

    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (b, c, h, w) encoded from images (b, 3, h, w) in [0, 1].

        Raises:
            ModelError: the network has no autoencoder, or the call is outside `with_autoencoder`.
        """
        raise ModelError(
            f"{self.family.display_name} is loaded without an autoencoder; turn off what encodes images."
        )


class Networks(Protocol):
    """Loads the networks of sources; steps that follow one another share it.

    `last_result` caches a result that a part computed with the network that was asked for last.
    """

    last_result: LastResult

    def get(self, source: Source, device: torch.device | str, dtype: torch.dtype) -> Network:
        """The network of a source on a device, which computes in `dtype` if it has a choice.

        Raises:
            ModelError: the source has changed since it was opened, or cannot be loaded.
        """

    def free(self) -> None:
        """Drop the cached network and result, so that their memory can be freed."""
