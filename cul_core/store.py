"""The step store: finished and unfinished steps by content, so that no training is repeated or lost when a program ends or forgets."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .anchors import AnchorStore
from .chain import StepRecord, UnlearnModel
from .config import canonical_json, stable_hash
from .errors import CheckpointError, ModelError, TrainingError
from .locks import lock_of, locked, try_locked
from .resume import State, joined, split
from .safetensor_files import leftovers, read_header, read_sealed, write_sealed
from .training import Request, StepReport

logger = logging.getLogger(__name__)
_RESULTS_VERSION = 2
"""Raise it when the same request on the same model starts to give another result."""
PARTS = ("steps", "anchors", "states")
"""Folders of the store: finished steps, anchor pictures, and the states of unfinished steps."""
EVERY_SECONDS = 10.0
"""Time between writings of a step's state and of its anchor pictures; more where a state is large or takes long to write."""
_BYTES_PER_INTERVAL, _SHARE_OF_TIME = 40e6, 0.05
_UNREADABLE = (ModelError, CheckpointError, KeyError, TypeError, ValueError)


def step_key(model: UnlearnModel, request: Request) -> str:
    """What a step's result depends on, as a SHA-256 in hex: the model, what it forgot before, the request, and this code's version."""
    return stable_hash([model.content_hash, list(model.forgotten), request.to_json(), _RESULTS_VERSION])


@dataclass(frozen=True)
class Outcome:
    """A step that was trained or found: the edited model, its report, and a note for people on where it comes from (", resumed ...")."""

    model: UnlearnModel
    report: StepReport
    note: str = ""


class StepStore:
    """Finished steps, states of unfinished ones, and anchor latents in a folder, bounded in size: the least recently used goes first.

    Files that this object has made or read stay, whatever the bound, and so does the state of a step that any process is training.
    Several processes may share the folder. Deleting it is always safe.

    Args:
        folder: made when first written to.
        largest_bytes: bound on all files together.
        every_seconds: takes the place of `EVERY_SECONDS`; 0 is after every update.
    """

    def __init__(self, folder: Path | str, largest_bytes: int = 8 << 30, every_seconds: float | None = None):
        self._folder, self._largest = Path(folder), largest_bytes
        self._every = EVERY_SECONDS if every_seconds is None else every_seconds
        self._locks = self._folder / "locks"
        self.anchors = AnchorStore(self._folder / "anchors", self._locks, self._every)
        self._in_use: set[Path] = set()

    def _path(self, part: str, key: str) -> Path:
        return self._folder / part / f"{key}.safetensors"

    def get(self, model: UnlearnModel, request: Request) -> tuple[UnlearnModel, StepReport] | None:
        """The result of an earlier identical step; None if there is none, or if its file is damaged (it is removed then)."""
        path = self._path("steps", step_key(model, request))
        if not path.is_file():
            return None
        try:
            edits, metadata = read_sealed(path, unsealed=True)
            values = json.loads(metadata["cul_step"])
            record = StepRecord(**values["record"])
            edited = model.with_step(edits, record)
            if edited.content_hash != record.result:
                raise CheckpointError("its weights are not those it announces")
        except _UNREADABLE as error:
            logger.warning("a stored step is damaged and is trained again: %s", error)
            _remove(path)
            return None
        self._use(path)
        return edited, StepReport(record, tuple(values["losses"]), values["figures"])

    def put(self, model: UnlearnModel, request: Request, edited: UnlearnModel, report: StepReport) -> None:
        """Keep a finished step.

        Raises:
            CheckpointError: the folder cannot be written or is full.
        """
        path = self._path("steps", step_key(model, request))
        values = {"record": asdict(report.record), "losses": report.losses, "figures": dict(report.figures)}
        write_sealed(path, edited.edits, edited.metadata() | {"cul_step": canonical_json(values)})
        self._use(path, *self.anchors.used)
        self._evict()

    def get_or_train(
        self, model: UnlearnModel, request: Request, train: Callable[[StepState], tuple[UnlearnModel, StepReport]],
        on_wait: Callable[[], None] = lambda: None,
    ) -> Outcome:  # fmt: skip
        """The step's result: found, or trained now, from where an earlier run was stopped, and kept. Of several processes one trains.

        Args:
            model: where the step begins.
            request: what it forgets and how.
            train: trains it, with this `keeper`.
            on_wait: runs several times a second while another process trains this step; may raise to wait no longer.
        """
        begun, path = time.monotonic(), self._path("states", step_key(model, request))
        found = self.get(model, request)
        if found is None:
            with locked(lock_of(self._locks, path), on_wait):
                found = self.get(model, request)  # another process may have made it meanwhile
                if found is None:
                    return self._trained(model, request, train, StepState(path, request, self._every))
        _remove(path)  # of a process that was killed between keeping the one and removing the other
        logger.info("took a finished step from the store in %.1f s: %s", time.monotonic() - begun, ", ".join(found[1].record.targets))
        return Outcome(*found, ", kept from an earlier run")

    def _trained(
        self, model: UnlearnModel, request: Request, train: Callable[[StepState], tuple[UnlearnModel, StepReport]], state: StepState
    ) -> Outcome:
        for part in ("steps", "states"):
            for path in leftovers(self._folder / part, state.path.stem):  # nobody else writes these now
                _remove(path)
        try:
            edited, report = train(state)
        except TrainingError:
            state.discard()
            raise
        note = f", resumed at iteration {state.resumed_at}" if state.resumed_at else ""
        try:
            self.put(model, request, edited, report)
        except CheckpointError as error:  # costs the next run its time, not this one its result
            logger.warning("the finished step is not kept for later runs: %s", error)
            return Outcome(edited, report, f"{note}. Not kept for later runs: {error}")
        state.discard()
        return Outcome(edited, report, note)

    # --- what there is, and how much of it may stay

    def files(self, *parts: str) -> list[tuple[int, int, Path]]:
        """(last use as a time stamp in ns, bytes, path) of every whole file, the least recently used first."""
        found = []
        for part in parts:
            with suppress(OSError):  # of what another process removes
                for path in (self._folder / part).glob("*.safetensors"):
                    with suppress(OSError):
                        found.append(((status := path.stat()).st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _use(self, *paths: Path) -> None:
        """These are the most recently used from here on, and stay. Time stamps only count up, whatever the clock does."""
        self._in_use.update(paths)
        stamp = max([time.time_ns(), *(stamp + 1 for stamp, _, _ in self.files(*PARTS)[-1:])])
        for path in paths:
            with suppress(OSError):
                os.utime(path, ns=(stamp, stamp))

    def _evict(self) -> None:
        with try_locked(self._locks / "evict.lock") as is_ours:
            if not is_ours:
                return
            files = self.files(*PARTS)
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total > self._largest and path not in self._in_use and self._remove_unlocked(path):
                    total -= size
            self._remove_leftovers(*PARTS)

    def _remove_leftovers(self, *parts: str) -> None:
        for part in parts:
            for path in leftovers(self._folder / part):
                self._remove_unlocked(path, belongs_to=Path(path.name.split(".")[1]))

    def _remove_unlocked(self, path: Path, belongs_to: Path | None = None) -> bool:
        """Whether the file is gone; it stays while a process works on the step or the anchors that it belongs to."""
        with try_locked(lock_of(self._locks, belongs_to or path)) as is_free:
            return is_free and _remove(path)

    def clear(self, *parts: str) -> str:
        """Remove what is in these of `PARTS`, but for files that a process is working on; says what was removed, as a line of text."""
        removed = freed = kept = 0
        for _, size, path in self.files(*parts):
            if self._remove_unlocked(path):
                removed, freed = removed + 1, freed + size
            else:
                kept += 1
        self._remove_leftovers(*parts)
        return f"removed {removed} files, {freed / 1e6:.1f} MB" + (f"; {kept} are in use or cannot be removed, and stay" if kept else "")

    def describe(self) -> str:
        """What is in the store, as text: a line for each kind of file, and one for each step."""
        lines = []
        for part, what in zip(PARTS, ("finished steps", "sets of anchor pictures", "unfinished steps"), strict=True):
            files = self.files(part)
            lines.append(f"{len(files)} {what}, {sum(size for _, size, _ in files) / 1e6:.1f} MB")
            if part != "anchors":
                lines += [f"  {_described(path)}, {size / 1e6:.1f} MB" for _, size, path in reversed(files)]
        return "\n".join(lines)


class StepState:
    """The state of a step in training, in a file; see `resume.StateKeeper`.

    Args:
        path: of the file.
        request: what is trained, for whoever looks at the store.
        every_seconds: time between writings.
    """

    def __init__(self, path: Path, request: Request, every_seconds: float):
        self.path, self._every = path, every_seconds
        self._about = {"targets": [concept.target for concept in request.concepts], "iterations": request.training.iterations}
        self._due = time.monotonic() + every_seconds / 5  # the first one early: what was prepared took time too
        self.resumed_at, self._has_failed = 0, False

    def load(self, origin: Mapping[str, Any]) -> State | None:
        if not self.path.is_file():
            return None
        try:
            tensors, metadata = read_sealed(self.path)
            values = json.loads(metadata["cul_state"])
            if values["state"]["origin"] != origin:
                logger.warning("the state of an unfinished step comes from another device or other versions, so the step begins anew")
                return None
            state = joined(values["state"], tensors)
            self.resumed_at = state["iteration"]
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
                self._due = begun + seconds + (max(self._every * often, seconds / _SHARE_OF_TIME) if self._every else 0)

    def save(self, state: State) -> None:
        plain, tensors = split(state)
        values = {"state": plain, **self._about}
        try:
            write_sealed(self.path, tensors, {"cul_state": json.dumps(values)})
        except CheckpointError as error:
            if not self._has_failed:
                logger.warning("the state of the step is not kept, so it cannot go on from here if it is stopped: %s", error)
            self._has_failed, self._due = True, time.monotonic() + self._every

    def discard(self) -> None:
        _remove(self.path)


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s stays: %s", path.name, error)
        return False
    return True


def _described(path: Path) -> str:
    try:
        _, metadata, _ = read_header(path)
        if "cul_step" in metadata:
            record = StepRecord(**json.loads(metadata["cul_step"])["record"])
            return f"{', '.join(record.targets)} ({record.finished}, {record.request['training']['iterations']} iterations)"
        values = json.loads(metadata["cul_state"])
        return f"{', '.join(values['targets'])} (stopped after iteration {values['state']['iteration']} of {values['iterations']})"
    except _UNREADABLE:
        return "a damaged file"
