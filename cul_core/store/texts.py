"""Store of sums over encoded text, which closed-form methods make once for each text encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..base.errors import CheckpointError, ModelError
from ..files.atomic_write import leftovers
from ..files.locks import lock_of, locked
from ..files.safetensors_format import read_sealed, write_sealed
from .eviction import remove

logger = logging.getLogger(__name__)


class TextStore:
    """Content-addressed sums over encoded text, on disk; see `TextSums`. Deleting the folder is always safe.

    Args:
        folder: of the files; created on the first write.
        locks: folder of lock files; of several processes that need the same sums, only one makes them.
    """

    def __init__(self, folder: Path, locks: Path):
        self._folder, self._locks = folder, locks
        self.used: set[Path] = set()

    def __call__(
        self, key: str, make: Callable[[], Mapping[str, Tensor]], check: Callable[[], None]
    ) -> Mapping[str, Tensor]:
        """See `TextSums`. A file that cannot be read or written never fails a step: the sums are made."""
        path = self._folder / f"text-{key[:32]}.safetensors"
        with locked(lock_of(self._locks, path), check):
            sums = _read(path)
            if sums is None:
                sums = make()
                _write(path, sums)
        self.used.add(path)
        return sums


def _read(path: Path) -> Mapping[str, Tensor] | None:
    for leftover in leftovers(path.parent, path.stem) if path.parent.is_dir() else ():
        remove(leftover)
    if not path.is_file():
        return None
    try:
        return read_sealed(path)[0]
    except (ModelError, CheckpointError) as error:
        logger.warning("stored sums over text are damaged and are made again: %s", error)
        remove(path)
        return None


def _write(path: Path, sums: Mapping[str, Tensor]) -> None:
    try:
        write_sealed(path, sums, {})
    except CheckpointError as error:
        logger.warning("sums over text are not kept for later steps: %s", error)
