"""A cache of a single value."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class LastResult:
    """Cache of the most recent value and its key."""

    def __init__(self):
        self._key, self._value = None, None

    def of(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The cached value if its key is `key`; else a new value by `make`, after the old one is freed."""
        if self._key is None or self._key != key:
            self.clear()
            self._value = make()
            self._key = key
        return self._value

    def clear(self) -> None:
        self._key, self._value = None, None
