"""Worker processes of demo and benchmark: one thread each; a worker ends with its parent process."""

from __future__ import annotations

import multiprocessing
import os
import threading

import torch


def prepare_worker() -> None:
    """Limit this worker to one thread and end it with its parent; call this first in a worker process."""
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent has ended, also when it was killed
    os._exit(1)
