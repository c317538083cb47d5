"""Giving memory back."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import lru_cache

import torch


def release_memory(device: torch.device) -> None:
    """Gives back what nothing uses any more, to whoever else needs the device's memory, or the system's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := _trim()) is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> ctypes._CFuncPtr | None:
    """glibc's malloc_trim: its heap keeps what is freed below something that is not. None with other C libraries."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
