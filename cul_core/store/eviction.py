"""Evict stored files when their folder reaches its bound or its disk is nearly full."""

from __future__ import annotations

import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..base.errors import CheckpointError
from ..files.atomic_write import leftovers
from ..files.locks import lock_of, try_locked

logger = logging.getLogger(__name__)
LEAST_BOUND = 8 << 30
"""A bound that follows the disk is never below this many bytes."""
_SHARE_OF_DISK = 4  # a quarter of the stored and free bytes
_MOST_RESERVED, _RESERVED_SHARE = 2 << 30, 20


class StoredFile(NamedTuple):
    """A complete file: time stamp of its last use in ns, size in bytes, path."""

    stamp: int
    size: int
    path: Path


@dataclass(frozen=True)
class Links:
    """Links of a file to others in its chain of steps.

    Args:
        makes: content hash of the model that the file holds; "" if nothing builds on it.
        needs: content hashes of all ancestors of that model.
    """

    makes: str = ""
    needs: frozenset[str] = frozenset()


class Disk(NamedTuple):
    """Size of a file system in bytes: `total`, `free`, and the `reserve` to leave free."""

    total: int
    free: int

    @property
    def reserve(self) -> int:
        return min(_MOST_RESERVED, self.total // _RESERVED_SHARE)


class _Process:
    """Holder of files until the process ends."""


_THIS_PROCESS = _Process()
_holders: dict[str, list[weakref.ref]] = {}


def hold(path: Path, holder: object = _THIS_PROCESS) -> None:
    """Keep this process from evicting `path` while `holder` is alive; by default until the process ends."""
    key = os.path.realpath(path)
    living = [other for ref in _holders.get(key, ()) if (other := ref()) is not None and other is not holder]
    _holders[key] = [weakref.ref(each) for each in (*living, holder)]


def is_held(path: Path) -> bool:
    """Whether a living holder keeps this process from evicting `path`."""
    return any(ref() is not None for ref in _holders.get(os.path.realpath(path), ()))


class Evictor:
    """Bounds the size of some folders by evicting the least recently used chain, its last file first.

    A chain is cut from its end: a file stays while another file builds on it. Files held by this process (see
    `hold`) and their ancestors always stay. Files that any process used within `recent_seconds` are evicted
    only when the disk is nearly full. Last uses are the files' time stamps, so several processes may share
    the folders. A file whose lock is taken stays.

    Args:
        folders: of the files, all on one disk.
        locks: folder of lock files.
        largest_bytes: bound on all files. None: a quarter of the disk's room, at least `LEAST_BOUND`.
        recent_seconds: how long a file counts as recently used.
        links: path -> the file's links in its chain.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        locks: Path,
        largest_bytes: int | None,
        recent_seconds: float,
        links: Callable[[Path], Links] = lambda path: Links(),
    ):
        self._folders, self._locks, self._largest = list(folders), locks, largest_bytes
        self._recent_ns, self._links = int(recent_seconds * 1e9), links

    def touch(self, *paths: Path) -> None:
        """Mark these files as the most recently used; time stamps grow even if the clock is set back."""
        stamp = max([time.time_ns(), *(file.stamp + 1 for file in stored_files(self._folders)[-1:])])
        for path in paths:
            with suppress(OSError):  # a folder that is read only
                os.utime(path, ns=(stamp, stamp))

    def make_room(self, size: int) -> None:
        """Evict files so that `size` more bytes fit.

        Raises:
            CheckpointError: the disk would be left with less than its reserve.
        """
        disk = self.evict(size)
        if disk is not None and disk.free < size + disk.reserve:
            raise CheckpointError(
                f"No space left in {str(self._folders[0].parent)!r}: {size / 1e6:.1f} MB are needed, and of "
                f"{disk.free / 1e6:.1f} MB that are free {disk.reserve / 1e6:.1f} MB stay so; free some "
                "space there."
            )

    def evict(self, incoming: int = 0) -> Disk | None:
        """Evict files until `incoming` more bytes fit the bounds; remove leftovers of killed processes.

        Returns the disk afterwards; None if it is unknown or another process is evicting.
        """
        with try_locked(self._locks / "evict.lock") as is_ours:
            if not is_ours:
                return None
            self._evict(incoming)
            self.remove_leftovers(self._folders)
            return disk_of(self._folders[0])

    def _evict(self, incoming: int) -> None:
        files, disk = stored_files(self._folders), disk_of(self._folders[0])
        stored = sum(file.size for file in files)
        over_bound = stored + incoming - self._bound(stored, disk)
        over_disk = incoming + disk.reserve - disk.free if disk is not None else 0
        if max(over_bound, over_disk) <= 0:
            return
        if _pull_back(files):
            files = stored_files(self._folders)
        recent, needed = time.time_ns() - self._recent_ns, set()
        for file, last_use, needs in _leaves_first(files, self._links):
            excess = over_disk if last_use > recent else max(over_bound, over_disk)
            is_free = file.path not in needed and not is_held(file.path)
            if excess > 0 and is_free and self.remove_unlocked(file.path, stamp=file.stamp):
                over_bound, over_disk = over_bound - file.size, over_disk - file.size
            else:
                needed |= needs

    def _bound(self, stored: int, disk: Disk | None) -> int:
        if self._largest is not None:
            return self._largest
        return max(LEAST_BOUND, (stored + disk.free) // _SHARE_OF_DISK) if disk is not None else LEAST_BOUND

    def remove_leftovers(self, folders: Iterable[Path]) -> None:
        """Remove half-written files of killed processes."""
        for folder in folders:
            with suppress(OSError):  # the folder vanishes meanwhile
                for path in leftovers(folder):
                    self.remove_unlocked(path, belongs_to=Path(path.name.split(".")[1]))

    def remove_unlocked(self, path: Path, belongs_to: Path | None = None, stamp: int | None = None) -> bool:
        """Remove a file that no process works on; whether it is gone.

        Args:
            path: of the file.
            belongs_to: the file whose lock counts, if not `path`.
            stamp: last use in ns; a file used since then stays.
        """
        with try_locked(lock_of(self._locks, belongs_to or path)) as is_free:
            return is_free and (stamp is None or _last_use(path) in (stamp, None)) and remove(path)


def stored_files(folders: Iterable[Path]) -> list[StoredFile]:
    """Every complete file in the folders, the least recently used first."""
    files = []
    for folder in folders:
        with suppress(OSError):  # the folder vanishes meanwhile
            for path in folder.glob("*.safetensors"):
                with suppress(OSError):  # another process removes it
                    status = path.stat()
                    files.append(StoredFile(status.st_mtime_ns, status.st_size, path))
    return sorted(files)


def remove(path: Path) -> bool:
    """Remove a file; whether it is gone. The system may refuse, as Windows does while the file is open."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s stays: %s", path.name, error)
        return False
    return True


def disk_of(folder: Path) -> Disk | None:
    """The disk of a folder, which need not exist yet; None if the system does not tell."""
    for place in (folder, *folder.parents):
        with suppress(OSError):
            usage = shutil.disk_usage(place)
            return Disk(usage.total, usage.free) if usage.total else None
    return None


def _leaves_first(
    files: Iterable[StoredFile],
    links: Callable[[Path], Links],
) -> list[tuple[StoredFile, int, set[Path]]]:
    """(file, last use of it or its descendants in ns, paths of its ancestors), in order of eviction."""
    files = sorted(files)
    linked = {file.path: links(file.path) for file in files}
    maker = {linked[file.path].makes: file.path for file in files}  # of duplicates the latest used
    maker.pop("", None)
    needs = {path: {maker[name] for name in link.needs & maker.keys()} for path, link in linked.items()}
    last_use = {file.path: file.stamp for file in files}
    for file in files:
        for path in needs[file.path]:
            last_use[path] = max(last_use[path], file.stamp)
    order = sorted(files, key=lambda file: (last_use[file.path], -len(needs[file.path]), file))
    return [(file, last_use[file.path], needs[file.path]) for file in order]


def _pull_back(files: Iterable[StoredFile]) -> bool:
    """Give files stamped in the future the present time, in their order; whether there were any."""
    now = time.time_ns()
    ahead = [file for file in sorted(files) if file.stamp > now]
    for number, file in enumerate(ahead):
        with suppress(OSError):
            os.utime(file.path, ns=(now + number, now + number))
    return bool(ahead)


def _last_use(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
