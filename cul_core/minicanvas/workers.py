"""Worker processes of demo and benchmark: one thread each, and none outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import threading

import torch


def prepare_worker() -> None:
    """To be called first in a worker process."""
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent is gone, however it ended
    os._exit(1)
