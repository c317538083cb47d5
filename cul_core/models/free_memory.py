"""What devices do when memory runs out, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import lru_cache

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors can take; None where nobody knows."""
    if device.type != "cuda":
        return None
    return (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory ran out; Apple's GPUs raise a RuntimeError for that."""
    says_so = isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    return says_so or isinstance(error, torch.OutOfMemoryError)


def release_memory(device: torch.device) -> None:
    """Gives back what nothing uses any more, to whoever else needs the device's memory, or the system's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif (trim := _trim()) is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> ctypes._CFuncPtr | None:
    """glibc's malloc_trim: its heap keeps what is freed below something that is not. None with other C
    libraries."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
