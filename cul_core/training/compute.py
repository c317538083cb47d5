"""How a step is computed: precision, checkpointing, micro-batches, compilation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.config import Config, setting


@dataclass(frozen=True)
class Compute(Config):
    """Compute settings. They change results by rounding only, so they are in no request and no hash.

    `auto` is resolved for the device and its free memory. The master weights, their optimizer state and the
    exact pretrained weights are always fp32.
    """

    dtype: str = setting(
        "auto",
        "Precision of the network. auto: fp32 on the CPU; on a CUDA GPU bf16, or fp16 if it has no bf16.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    checkpointing: str = setting(
        "auto",
        "Gradient checkpointing: recompute activations in the backward pass instead of keeping them, for "
        "much less memory and a third more time. auto: when memory is short.",
        choices=("auto", "on", "off"),
    )
    compile: bool = setting(
        False, "Compile the network first (torch.compile); takes minutes, then every update is faster."
    )
    largest_micro_batch: int = setting(
        0,
        "Largest micro-batch: images in one pass of the network; 0: the whole batch, less when memory is "
        "short.",
        minimum=0,
    )

    def dtype_on(self, device: torch.device | str) -> torch.dtype:
        """The network's dtype on a device, with `auto` resolved."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        device = torch.device(device)
        if device.type != "cuda":
            return torch.float32
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
