"""How a step is computed, as opposed to what it computes: precision, memory for time, compilation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.config import Config, setting


@dataclass(frozen=True)
class Compute(Config):
    """No part of a request and of no hash: results differ by rounding alone. `auto` is chosen for the device
    and its free memory.

    The trained weights, their optimizer and the exact pretrained values are fp32 in any case.
    """

    dtype: str = setting(
        "auto",
        "What the network computes in. auto: fp32 on the CPU; on a CUDA GPU bf16, or fp16 if it has no bf16.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    checkpointing: str = setting(
        "auto",
        "Compute parts of the forward pass again in the backward pass instead of keeping them: much less "
        "memory, a third more time. auto: when memory is short.",
        choices=("auto", "on", "off"),
    )
    compile: bool = setting(
        False, "Compile the network first (torch.compile); takes minutes, then every update is faster."
    )
    largest_micro_batch: int = setting(
        0,
        "Pictures that go through the network at a time; 0: the whole batch, less when memory is short.",
        minimum=0,
    )

    def dtype_on(self, device: torch.device | str) -> torch.dtype:
        """What the network computes in on a device."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        device = torch.device(device)
        if device.type != "cuda":
            return torch.float32
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
