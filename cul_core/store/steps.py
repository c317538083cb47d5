"""The step store: finished and unfinished steps by content, so that no training is repeated or lost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ..base.config import canonical_json, stable_hash
from ..base.errors import CheckpointError, MemoryShortError, TrainingError
from ..files.atomic_write import leftovers
from ..files.locks import lock_of, locked
from ..files.safetensors_format import read_header, read_sealed, write_sealed
from ..history.step_record import StepRecord, read_history
from ..history.unlearn_model import UnlearnModel
from ..requests.request import Request, effort
from ..training.step import StepReport
from .anchors import AnchorStore
from .eviction import Evictor, Links, StoredFile, hold, remove, stored_files
from .format_1 import current, former_hash, is_format_1
from .step_state import _UNREADABLE, EVERY_SECONDS, StepState
from .texts import TextStore

logger = logging.getLogger(__name__)
_RESULTS_VERSION = 1
"""Raise it when a code change alters the result of every request; a part has its own version
(`Config.results_version`)."""
PARTS = ("steps", "anchors", "states", "texts")
"""Folders of the store: finished steps, anchor images, states of unfinished steps, and sums over encoded
text."""
KEPT = ", kept from an earlier run"
"""Note of a step that was not trained, because the store had it."""
_RECENT_SECONDS = 24 * 3600.0


def step_key(model: UnlearnModel, request: Request) -> str:
    """SHA-256 in hex of everything that determines a step's result.

    These are the model's content hash, its forgotten concepts, the request, and the version of results.
    """
    return _key(model.content_hash, model, request)


def _key(content_hash: str, model: UnlearnModel, request: Request) -> str:
    versions = {part.registry_name: part.results_version for part in (request.method, *request.regularizers)}
    newer = {name: version for name, version in versions.items() if version > 1}
    parts = [content_hash, list(model.forgotten), request.to_json(), _RESULTS_VERSION]
    return stable_hash([*parts, newer] if newer else parts)


@dataclass(frozen=True)
class Outcome:
    """A step that was trained or found in the store.

    Args:
        model: the edited model.
        report: of the step.
        note: for the user, on how the result came about, such as ", resumed at iteration 40".
        is_kept: whether the step is in the store.
    """

    model: UnlearnModel
    report: StepReport
    note: str = ""
    is_kept: bool = True


class StepStore:
    """Finished steps, states of unfinished steps, and anchor latents in a folder of bounded size.

    Beyond the bound, the least recently used chain of steps is evicted, its last step first (see
    `eviction.Evictor`). Steps that this process made or read stay, with all their ancestors. Files that any
    process used within a day stay unless the disk is nearly full. The state of a step in training stays, in
    whichever process. Several processes may share the folder. Deleting it is always safe.

    Args:
        folder: of the store; created on the first write.
        largest_bytes: bound on all files together; None follows the disk's room.
        every_seconds: replaces `EVERY_SECONDS`; 0 writes after every update.
    """

    def __init__(
        self, folder: Path | str, largest_bytes: int | None = None, every_seconds: float | None = None
    ):
        self._folder = Path(folder)
        self._every = EVERY_SECONDS if every_seconds is None else every_seconds
        self._locks = self._folder / "locks"
        folders = [self._folder / part for part in PARTS]
        self._evictor = Evictor(folders, self._locks, largest_bytes, _RECENT_SECONDS, _links_of)
        self.anchors = AnchorStore(self._folder / "anchors", self._locks, self._every)
        self.texts = TextStore(self._folder / "texts", self._locks)

    def _path(self, part: str, key: str) -> Path:
        return self._folder / part / f"{key}.safetensors"

    def get(self, model: UnlearnModel, request: Request) -> tuple[UnlearnModel, StepReport] | None:
        """(edited model, report) of an identical earlier step; None if there is none.

        A damaged file is removed and counts as none. A step of format 1 is rewritten in the current format.
        """
        path = self._path("steps", step_key(model, request))
        if not path.is_file() and (path := self._former_path(model, request)) is None:
            return None
        try:
            edits, metadata = read_sealed(path, unsealed=True)
            values = json.loads(metadata["cul_step"])
            record = StepRecord(**values["record"])
            if is_format_1(metadata):
                edits, record = current(model, edits, record)
            edited = model.with_step(edits, record)
            if edited.content_hash != record.result:
                raise CheckpointError("its weights are not those it announces")
        except _UNREADABLE as error:
            logger.warning("a stored step is damaged and is trained again: %s", error)
            remove(path)
            return None
        report = StepReport(record, tuple(values["losses"]), values["figures"])
        if is_format_1(metadata):
            path = self._written_anew(path, model, request, edited, report)
        self._use(path)
        return edited, report

    def _former_path(self, model: UnlearnModel, request: Request) -> Path | None:
        """The step's file under its format 1 key; None if there is none."""
        if not model.edits or not (self._folder / "steps").is_dir():
            return None
        content_hash = former_hash(model)
        path = self._path("steps", _key(content_hash, model, request)) if content_hash else None
        return path if path is not None and path.is_file() else None

    def _written_anew(
        self, path: Path, model: UnlearnModel, request: Request, edited: UnlearnModel, report: StepReport
    ) -> Path:
        """Rewrite a format 1 step; the path of the new file, or of the old one if writing fails."""
        rewritten = self._path("steps", step_key(model, request))
        try:
            self._write(rewritten, edited, report)
        except CheckpointError as error:
            logger.warning("a stored step stays as an older version wrote it: %s", error)
            return path
        if path != rewritten:
            remove(path)
        return rewritten

    def put(self, model: UnlearnModel, request: Request, edited: UnlearnModel, report: StepReport) -> None:
        """Store a finished step.

        Raises:
            CheckpointError: the folder cannot be written, or its disk has no room.
        """
        key = step_key(model, request)
        # the step replaces its state, whose bytes are freed afterwards
        path, freed = self._path("steps", key), _size_of(self._path("states", key))
        self._evictor.make_room(edited.nbytes() - freed)
        self._write(path, edited, report)
        self._use(path, *self.anchors.used, *self.texts.used)
        self._evict(-freed)

    def _write(self, path: Path, edited: UnlearnModel, report: StepReport) -> None:
        values = {"record": asdict(report.record), "losses": report.losses, "figures": dict(report.figures)}
        write_sealed(path, edited.edits, edited.metadata() | {"cul_step": canonical_json(values)})

    def get_or_train(
        self,
        model: UnlearnModel,
        request: Request,
        train: Callable[[StepState], tuple[UnlearnModel, StepReport]],
        on_wait: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """The step's result: from the store, or trained now, resumed from an earlier run's state, and stored.

        Of several processes that ask for the same step, one trains and the others wait.

        Args:
            model: the step's start.
            request: what to forget and how.
            train: trains the step with this `state_store`.
            on_wait: called several times a second while another process trains the step; may raise to stop
                waiting.

        Raises:
            MemoryShortError: from `train`; the message names the iteration from which the next run resumes.
        """
        begun, path = time.monotonic(), self._path("states", step_key(model, request))
        stored = self.get(model, request)
        if stored is None:
            with locked(lock_of(self._locks, path), on_wait):
                stored = self.get(model, request)  # another process may have trained it meanwhile
                if stored is None:
                    needs = _ancestors(model.content_hash, model.history)
                    return self._trained(model, request, train, StepState(path, request, self._every, needs))
        # the state of a process that was killed between storing the step and removing the state
        remove(path)
        logger.info(
            "took a finished step from the store in %.1f s: %s",
            time.monotonic() - begun,
            ", ".join(stored[1].record.targets),
        )
        return Outcome(*stored, KEPT)

    def _trained(
        self,
        model: UnlearnModel,
        request: Request,
        train: Callable[[StepState], tuple[UnlearnModel, StepReport]],
        state: StepState,
    ) -> Outcome:
        for part in ("steps", "states"):
            for path in leftovers(self._folder / part, state.path.stem):  # nobody else writes these now
                remove(path)
        try:
            edited, report = train(state)
        except TrainingError:
            state.discard()
            raise
        except MemoryShortError as error:
            if not state.kept_at:
                raise
            raise MemoryShortError(
                f"{str(error).removesuffix('.')}; run the step again with more free memory, it goes on from "
                f"iteration {state.kept_at} of {request.training.iterations}."
            ) from error
        note = f", resumed at iteration {state.resumed_at}" if state.resumed_at else ""
        try:
            self.put(model, request, edited, report)
        except CheckpointError as error:  # the result is still returned; the next run trains again
            logger.warning("the finished step is not kept for later runs: %s", error)
            return Outcome(edited, report, f"{note}. Not kept for later runs: {error}", is_kept=False)
        state.discard()
        return Outcome(edited, report, note)

    # --- what there is, and how much of it may stay

    def files(self, *parts: str) -> list[StoredFile]:
        """Every complete file in these of `PARTS`, the least recently used first."""
        return stored_files(self._folder / part for part in parts)

    def _use(self, *paths: Path) -> None:
        """Mark these files as the most recently used, and hold them while this process runs."""
        self._evictor.touch(*paths)
        for path in paths:
            hold(path)

    def _evict(self, incoming: int = 0) -> None:
        self._evictor.evict(incoming)

    def clear(self, *parts: str) -> str:
        """Remove all files in these of `PARTS` that no process works on; a line of text about it."""
        removed = freed = kept = 0
        for _, size, path in self.files(*parts):
            if self._evictor.remove_unlocked(path):
                removed, freed = removed + 1, freed + size
            else:
                kept += 1
        self._evictor.remove_leftovers(self._folder / part for part in parts)
        return f"removed {removed} files, {freed / 1e6:.1f} MB" + (
            f"; {kept} are in use or cannot be removed, and stay" if kept else ""
        )

    def describe(self) -> str:
        """The store's content as text: a line for each kind of file, and one for each step."""
        lines = []
        kinds = ("finished steps", "sets of anchor images", "unfinished steps", "sums over text")
        for part, what in zip(PARTS, kinds, strict=True):
            files = self.files(part)
            lines.append(f"{len(files)} {what}, {sum(size for _, size, _ in files) / 1e6:.1f} MB")
            if part in ("steps", "states"):
                lines += [f"  {_described(path)}, {size / 1e6:.1f} MB" for _, size, path in reversed(files)]
        return "\n".join(lines)


def _ancestors(parent: str, history: Iterable[StepRecord]) -> frozenset[str]:
    """Content hashes of `parent` and all its ancestors; a merge has all merged models as parents."""
    made_by = {record.result: record for record in history}
    ancestors, open_ends = set(), [parent]
    while open_ends:
        if (name := open_ends.pop()) not in ancestors:
            ancestors.add(name)
            if (record := made_by.get(name)) is not None:
                open_ends += record.request["models"] if record.is_merge else [record.parent]
    return frozenset(ancestors)


def _links_of(path: Path) -> Links:
    """Links of a step's or state's file in its chain; none for anchors and damaged files."""
    if path.parent.name not in ("steps", "states"):
        return Links()
    try:
        status = path.stat()
        return _read_links(path, status.st_size, status.st_mtime_ns)
    except (OSError, *_UNREADABLE):
        return Links()


@lru_cache(maxsize=4096)
def _read_links(path: Path, size: int, modified: int) -> Links:
    history, _ = read_history(path)
    if history:
        return Links(history[-1].result, _ancestors(history[-1].parent, history))
    _, metadata, _ = read_header(path)
    return Links(needs=frozenset(json.loads(metadata["cul_state"])["needs"]))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _described(path: Path) -> str:
    try:
        _, metadata, _ = read_header(path)
        if "cul_step" in metadata:
            record = StepRecord(**json.loads(metadata["cul_step"])["record"])
            return f"{', '.join(record.targets)} ({record.finished}, {effort(record.request)})"
        values = json.loads(metadata["cul_state"])
        return (
            f"{', '.join(values['targets'])} (stopped after iteration {values['state']['iteration']} of "
            f"{values['iterations']})"
        )
    except _UNREADABLE:
        return "a damaged file"
