"""A least-recently-used cache in memory whose size is bounded in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Least-recently-used (LRU) cache: values by key, in the order of their last use.

    Only `shrink` evicts, so one call of the caller may exceed the bound.

    Args:
        size_of: value -> its bytes.
    """

    def __init__(self, size_of: Callable[[Value], int]):
        self._values: dict[str, Value] = {}
        self._size_of, self._nbytes = size_of, 0

    def get(self, key: str) -> Value | None:
        """The cached value, marked as the most recently used; None if the key is not cached."""
        if key not in self._values:
            return None
        self._values[key] = self._values.pop(key)
        return self._values[key]

    def put(self, key: str, value: Value) -> None:
        """Cache a value as the most recently used; it replaces the old value of its key."""
        if key in self._values:
            self._nbytes -= self._size_of(self._values.pop(key))
        self._values[key] = value
        self._nbytes += self._size_of(value)

    def shrink(self, largest_bytes: int) -> None:
        """Evict the least recently used values until the cache holds at most `largest_bytes`."""
        for key in list(self._values):
            if self._nbytes <= largest_bytes:
                return
            self._nbytes -= self._size_of(self._values.pop(key))

    def clear(self) -> None:
        self._values.clear()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all cached values."""
        return self._nbytes

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """Keys, the least recently used first."""
        return iter(list(self._values))

    def __len__(self) -> int:
        return len(self._values)
