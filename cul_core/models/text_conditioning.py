"""Conditioning: encoded prompts for a batch of images, in a form common to all families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A batch of encoded prompts.

    Args:
        text: text rows (b, n, d), the inputs of the network's text readers.
        pooled: pooled vectors (b, p) of the prompts; None in families whose network reads none.
        mask: (b, n), true where a row counts; None if all rows do.
        extra: what else the network reads of each prompt, which no other code looks at; None if nothing.
    """

    text: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    extra: tuple[Any, ...] | None = None

    @classmethod
    def cat(cls, parts: Iterable[Conditioning]) -> Conditioning:
        """Concatenation of batches of one family; shorter prompts get rows of zeros that do not count."""
        parts = list(parts)
        length = max(part.text.shape[1] for part in parts)
        if any(part.text.shape[1] < length or part.mask is not None for part in parts):
            parts = [part._padded(length) for part in parts]
        columns = zip(*((part.text, part.pooled, part.mask) for part in parts), strict=True)
        tensors = (None if column[0] is None else torch.cat(column) for column in columns)
        has_extra = parts[0].extra is not None
        return cls(*tensors, tuple(one for part in parts for one in part.extra) if has_extra else None)

    def _padded(self, length: int) -> Conditioning:
        more = length - self.text.shape[1]
        mask = torch.ones_like(self.text[..., 0], dtype=torch.bool) if self.mask is None else self.mask
        return replace(self, text=pad(self.text, (0, 0, 0, more)), mask=pad(mask, (0, more)))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The prompts at `index`, as a batch; a single number gives a batch of one."""
        index = [index] if isinstance(index, int) else index
        picked = self._each(lambda tensor: tensor[index])
        if self.extra is None:
            return picked
        numbers = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index]
        return replace(picked, extra=tuple(self.extra[i] for i in numbers))

    def expand(self, count: int) -> Conditioning:
        """A batch of one prompt repeated `count` times, without a copy."""
        expanded = self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))
        return expanded if self.extra is None else replace(expanded, extra=self.extra * count)

    def to(self, device: torch.device | str) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        tensors = (self.text, self.pooled, self.mask)
        return Conditioning(*(None if tensor is None else change(tensor) for tensor in tensors), self.extra)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but those of `extra`."""
        return sum(tensor.nbytes for tensor in (self.text, self.pooled, self.mask) if tensor is not None)

    @property
    def device(self) -> torch.device:
        return self.text.device
