"""The measurements that one side of a comparison records of itself.

The file runs in either interpreter: it needs the standard library and torch alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Marks:
    """Times on the monotonic clock that all processes share, seconds of processor time, calls of the UNet.

    Measured functions are wrapped and compute as before.
    """

    def __init__(self):
        self._calls = self._pictures = 0
        self._updates: list[list[float]] = []
        self._spans: dict[str, list[dict]] = {}
        self._notes: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        self._notes |= values

    def updated(self, *_: Any) -> None:
        """Record the end of an update of the weights."""
        self._updates.append([time.monotonic(), time.process_time()])

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, with a span recorded for every call: begin, end, processor time, UNet calls, images."""

        def wrapped(*args, **kwargs):
            begin, cpu, calls, pictures = time.monotonic(), time.process_time(), self._calls, self._pictures
            result = function(*args, **kwargs)
            self._spans.setdefault(name, []).append(
                {
                    "begin": begin,
                    "end": time.monotonic(),
                    "cpu": time.process_time() - cpu,
                    "calls": self._calls - calls,
                    "pictures": self._pictures - pictures,
                }
            )
            return result

        return wrapped

    def count_calls(self, unet: type) -> None:
        """Count the calls of this UNet class and the images in them; a guided call has two of each image."""
        forward = unet.forward

        def counted(module, sample, *args, **kwargs):
            self._calls += 1
            self._pictures += len(sample)
            return forward(module, sample, *args, **kwargs)

        unet.forward = counted

    def save(self, path: Path, shims: list[str]) -> None:
        status = Path("/proc/self/status")
        peak = (
            [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            if status.exists()
            else []
        )
        path.write_text(
            json.dumps(
                {
                    "updates": self._updates,
                    "spans": self._spans,
                    "notes": self._notes,
                    "shims": shims,
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "peak_bytes": int(peak[0]) * 1024 if peak else None,
                }
            ),
            encoding="utf-8",
        )
