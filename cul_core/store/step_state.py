"""The file of an unfinished step's state, written at intervals so that a stopped step can resume."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..base.errors import CheckpointError, ModelError
from ..files.safetensors_format import read_sealed, write_sealed
from ..requests.request import Request
from ..training.resume import State, joined, split
from .eviction import remove

logger = logging.getLogger(__name__)
EVERY_SECONDS = 10.0
"""Time between writes of a step's state and its anchor images; longer for a state that is large or slow."""
_BYTES_PER_INTERVAL, _SHARE_OF_TIME = 40e6, 0.05
_QUICK_SECONDS, _LONGEST_SECONDS = 1.0, 5.0
_BYTES_PER_SECOND = 100e6
"""Write speed of a hard disk."""
_UNREADABLE = (ModelError, CheckpointError, KeyError, TypeError, ValueError)


class StepState:
    """The state of a step in training, in a file; see `resume.StateStore`.

    Args:
        path: of the file.
        request: the step's request, described in the store's listing.
        every_seconds: time between writes.
        needs: content hashes of the models on which the step builds.

    Attributes:
        resumed_at: iteration at which this run resumed; 0 if it began anew.
        kept_at: iteration of the state in the file, from which the next run resumes; 0 if there is none.
    """

    def __init__(self, path: Path, request: Request, every_seconds: float, needs: Iterable[str] = ()):
        self.path, self._every = path, every_seconds
        self._about = {
            "targets": [concept.target for concept in request.concepts],
            "iterations": request.training.iterations,
            "needs": sorted(needs),
        }
        # the first write is early, because preparation took time too
        self._due = time.monotonic() + every_seconds / 5
        self.resumed_at = self.kept_at = 0
        self._has_failed = False
        self._kept_since = time.monotonic()
        self._seconds_to_write: float | None = None

    def load(self, origin: Mapping[str, Any]) -> State | None:
        if not self.path.is_file():
            return None
        try:
            tensors, metadata = read_sealed(self.path)
            values = json.loads(metadata["cul_state"])
            if values["state"]["origin"] != origin:
                logger.warning(
                    "the state of an unfinished step comes from another device or other versions, so the "
                    "step begins anew"
                )
                return None
            state = joined(values["state"], tensors)
            self.resumed_at = self.kept_at = state["iteration"]
        except _UNREADABLE as error:
            logger.warning("the state of an unfinished step is damaged, so the step begins anew: %s", error)
            self.discard()
            return None
        return state

    def offer(self, state: Callable[[], State]) -> None:
        if (begun := time.monotonic()) >= self._due:
            self.save(state())
            seconds = time.monotonic() - begun
            with suppress(OSError):
                often = max(1.0, self.path.stat().st_size / _BYTES_PER_INTERVAL)
                self._due = (
                    begun
                    + seconds
                    + (max(self._every * often, seconds / _SHARE_OF_TIME) if self._every else 0)
                )

    def save_if_quick(self, state: State) -> None:
        """Write the state if that takes at most 1 s, or at most 5 s and less than the work it saves."""
        seconds = self._seconds_to_write
        if seconds is None:
            seconds = sum(tensor.nbytes for tensor in split(state)[1].values()) / _BYTES_PER_SECOND
        lost = time.monotonic() - self._kept_since
        if seconds <= max(_QUICK_SECONDS, min(lost, _LONGEST_SECONDS)):
            self.save(state)
        else:
            logger.info("the state is not written, which takes %.0f s; the last is %.0f s old", seconds, lost)

    def save(self, state: State) -> None:
        begun = time.monotonic()
        try:
            plain, tensors = split(state)
            write_sealed(self.path, tensors, {"cul_state": json.dumps({"state": plain, **self._about})})
        except CheckpointError as error:
            if not self._has_failed:
                logger.warning(
                    "the state of the step is not kept, so it cannot go on from here if it is stopped: %s",
                    error,
                )
            self._has_failed, self._due = True, time.monotonic() + self._every
        else:
            self.kept_at = state["iteration"]
            self._kept_since = time.monotonic()
            self._seconds_to_write = self._kept_since - begun

    def discard(self) -> None:
        remove(self.path)
        self.kept_at = 0
