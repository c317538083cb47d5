"""Conditioning: encoded prompts for a batch of images, in a form common to all families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A batch of encoded prompts.

    Args:
        text: text rows (b, n, d), the inputs of the network's text readers.
        pooled: pooled vectors (b, p) of the prompts; None in families whose network reads none.
        mask: (b, n), true where a row counts; None if all rows do.
    """

    text: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def cat(cls, parts: Iterable[Conditioning]) -> Conditioning:
        """Concatenation of batches of one family that have equally many rows."""
        columns = zip(*((part.text, part.pooled, part.mask) for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The prompts at `index`, as a batch; a single number gives a batch of one."""
        return self._each(lambda tensor: tensor[[index] if isinstance(index, int) else index])

    def expand(self, count: int) -> Conditioning:
        """A batch of one prompt repeated `count` times, without a copy."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        tensors = (self.text, self.pooled, self.mask)
        return Conditioning(*(None if tensor is None else change(tensor) for tensor in tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.text, self.pooled, self.mask) if tensor is not None)

    @property
    def device(self) -> torch.device:
        return self.text.device
