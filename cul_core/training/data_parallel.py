"""One step on several processes: each predicts its rows of every batch, and gradients are added up.

The loss is that of the whole batch, computed by every process from all predictions, so that it is the loss of
one process to rounding. A launcher such as `torchrun` or `accelerate launch` starts the processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from ..base.errors import ConfigError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: they wait for anchor pictures and measurements of the first."""


class Processes:
    """The processes that train one step together; by default this one alone.

    Attributes:
        rank: number of this process; 0 is the one that writes files and talks to the user.
        count: number of processes.
    """

    rank, count = 0, 1

    def part(self, rows: int, rank: int | None = None) -> slice:
        """Rows of a batch that a process predicts; those of this one if no rank is given."""
        rank = self.rank if rank is None else rank
        return slice(rank * rows // self.count, (rank + 1) * rows // self.count)

    def gathered(self, own: Tensor, rows: int) -> Tensor:
        """The rows of all processes, in order, from those of this one."""
        return own

    def add_up(self, tensor: Tensor) -> None:
        """Add to a tensor, in place, those of the other processes."""

    def told(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every process."""
        return make()

    def close(self) -> None:
        """Leave the others."""


class _Joined(Processes):
    def __init__(self):
        self.rank, self.count = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gathered(self, own: Tensor, rows: int) -> Tensor:
        most = -(-rows // self.count)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(parts, padded.contiguous())
        spans = [self.part(rows, rank) for rank in range(self.count)]
        return torch.cat([part[: at.stop - at.start] for part, at in zip(parts, spans, strict=True)])

    def add_up(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def told(self, make: Callable[[], T]) -> T:
        box = [make() if not self.rank else None]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def joined_processes() -> Processes:
    """The processes that a launcher has started, by the variables that it sets; this one alone without them.

    Raises:
        ConfigError: this PyTorch cannot work on several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return Processes()
    if not torch.distributed.is_available():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this PyTorch is built without "
            "torch.distributed; start one process."
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    return _Joined()


def own_device(name: str) -> str:
    """The device of this process: each of several takes the GPU of its number if `name` is just `cuda`."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name
