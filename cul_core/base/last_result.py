"""A cache of one value."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class LastResult:
    """The value that was made last; it costs nothing to ask for it again with the same key."""

    def __init__(self):
        self._key, self._value = None, None

    def of(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The last value if its key was this one; else a new one, after the old one is let go."""
        if self._key is None or self._key != key:
            self.clear()
            self._value = make()
            self._key = key
        return self._value

    def clear(self) -> None:
        self._key, self._value = None, None
