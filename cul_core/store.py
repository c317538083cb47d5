"""The step store: finished steps by content, so that no training is repeated or lost when a host forgets its results."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from .anchors import AnchorStore
from .chain import StepRecord, UnlearnModel
from .config import canonical_json, stable_hash
from .errors import CheckpointError, ModelError
from .safetensor_files import opened, read_header, write_atomically
from .training import Request, StepReport

logger = logging.getLogger(__name__)
_RESULTS_VERSION = 1
"""Raise it when the same request on the same model starts to give another result."""


def step_key(model: UnlearnModel, request: Request) -> str:
    """What a step's result depends on, as a SHA-256 in hex: the model, what it forgot before, the request, and this code's version."""
    return stable_hash([model.content_hash, list(model.forgotten), request.to_json(), _RESULTS_VERSION])


class StepStore:
    """Finished steps and anchor latents in a folder, bounded in size: the least recently used step goes first.

    Steps that this object has made or read stay, whatever the bound. Deleting the folder is always safe.

    Args:
        folder: made when first written to.
        largest_bytes: bound on the files of finished steps.
    """

    def __init__(self, folder: Path | str, largest_bytes: int = 8 << 30):
        self._folder, self._largest = Path(folder), largest_bytes
        self.anchors = AnchorStore(self._folder / "anchors")
        self._in_use: set[Path] = set()

    def _path(self, key: str) -> Path:
        return self._folder / "steps" / f"{key}.safetensors"

    def get(self, model: UnlearnModel, request: Request) -> tuple[UnlearnModel, StepReport] | None:
        """The result of an earlier identical step; None if there is none, or if its file is damaged (it is removed then)."""
        path = self._path(step_key(model, request))
        if not path.is_file():
            return None
        try:
            _, metadata, _ = read_header(path)
            values = json.loads(metadata["cul_step"])
            record = StepRecord(**values["record"])
            with opened(path) as file:
                edited = model.with_step({name: file.get_tensor(name) for name in file.keys()}, record)
            if edited.content_hash != record.result:
                raise CheckpointError("its weights are not those it announces")
        except (ModelError, CheckpointError, KeyError, TypeError, ValueError) as error:
            logger.warning("a stored step is damaged and is trained again: %s", error)
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        self._in_use.add(path)
        return edited, StepReport(record, tuple(values["losses"]), values["figures"])

    def put(self, model: UnlearnModel, request: Request, edited: UnlearnModel, report: StepReport) -> None:
        """Keep a finished step.

        Raises:
            CheckpointError: the folder cannot be written or is full.
        """
        path = self._path(step_key(model, request))
        values = {"record": asdict(report.record), "losses": report.losses, "figures": dict(report.figures)}
        metadata = edited.metadata() | {"cul_step": canonical_json(values)}
        data = save({name: delta.contiguous() for name, delta in edited.edits.items()}, metadata=metadata)
        write_atomically(path, lambda file: file.write(data))
        self._in_use.add(path)
        self._evict()

    def _evict(self) -> None:
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._path("").parent.glob("*.safetensors"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total > self._largest and path not in self._in_use:
                path.unlink(missing_ok=True)
                total -= size
