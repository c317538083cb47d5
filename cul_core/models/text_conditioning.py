"""Encoded prompts: what a UNet is told about a batch of pictures, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A batch of encoded prompts.

    Args:
        text: (b, 77, d), the rows that cross-attention reads.
        pooled: (b, p), one vector for each whole prompt, in families whose UNet reads that too; None in
            others.
    """

    text: Tensor
    pooled: Tensor | None = None

    @classmethod
    def cat(cls, parts: Iterable[Conditioning]) -> Conditioning:
        """One batch of several of one family."""
        parts = list(parts)
        pooled = [part.pooled for part in parts]
        return cls(torch.cat([part.text for part in parts]), None if pooled[0] is None else torch.cat(pooled))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Those prompts, as a batch; a single number gives a batch of one."""
        return self._each(lambda tensor: tensor[[index] if isinstance(index, int) else index])

    def expand(self, count: int) -> Conditioning:
        """`count` times the only prompt."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(change(self.text), None if self.pooled is None else change(self.pooled))

    @property
    def device(self) -> torch.device:
        return self.text.device
