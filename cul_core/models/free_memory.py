"""Device memory: how much is free, out-of-memory errors, and releasing caches."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import lru_cache

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes free for new tensors on a device; None where PyTorch cannot tell."""
    if device.type != "cuda":
        return None
    return (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; on MPS that is a plain RuntimeError."""
    says_so = isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    return says_so or isinstance(error, torch.OutOfMemoryError)


def release_memory(device: torch.device) -> None:
    """Return unused cached memory to the device, or for the CPU to the operating system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif (trim := _trim()) is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> ctypes._CFuncPtr | None:
    """glibc's `malloc_trim`, which returns memory freed below live allocations; None without glibc."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
