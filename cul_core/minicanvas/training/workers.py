"""Processes of one thread each that train one module and average their gradients."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn


class Workers:
    """The data-parallel group: rank, size, averaged gradients and gathered tensors."""

    def __init__(self, rank: int, size: int, port: int):
        self.rank, self.size = rank, size
        torch.set_num_threads(1)
        if size > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            torch.distributed.init_process_group("gloo", rank=rank, world_size=size)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.size == 1:
            return
        grads = [p.grad for p in parameters]
        flat = torch._utils._flatten_dense_tensors(grads)
        torch.distributed.all_reduce(flat)
        for grad, mean in zip(
            grads, torch._utils._unflatten_dense_tensors(flat / self.size, grads), strict=True
        ):
            grad.copy_(mean)

    def gather(self, part: Tensor) -> Tensor:
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part)
        return torch.cat(parts)

    def agree(self, is_so: bool) -> bool:
        """Whether it is so in every worker."""
        if self.size == 1:
            return is_so
        flag = torch.tensor(int(is_so))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def wait(self) -> None:
        """Wait for the other workers."""
        if self.size > 1:
            torch.distributed.barrier()
