"""Named things that nodes, help pages, the command line and the common tests list without knowing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .config import Config, check_object
from .errors import ConfigError, brief_repr

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered class with what users see of it."""

    name: str
    cls: type[T]
    config: type[Config]
    display_name: str
    description: str
    paper: str


class Registry(Generic[T]):
    """Registered classes by name; `kind` ("method", "regularizer") is what error messages call them."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, **details: Any) -> Callable[[type[T]], type[T]]:
        """Decorator: `@METHODS.register("conabl", config=ConAblConfig, display_name=..., ...)`."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in self._entries:
            raise ConfigError(
                f"{self.kind} name {name!r} is taken or not lower_snake_case; choose another one."
            )

        def add(cls: type[T]) -> type[T]:
            self._entries[name] = Entry(name=name, cls=cls, **details)
            details["config"].registry_name = name
            return cls

        return add

    def get(self, name: str) -> Entry[T]:
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(
                f"There is no {self.kind} {brief_repr(name)}; choose one of {', '.join(self._entries)}."
            )
        return self._entries[name]

    def of(self, config: Config) -> Entry[T]:
        """The entry that a config belongs to."""
        if not isinstance(config, Config):
            raise ConfigError(
                f"A {self.kind} is needed where there is {brief_repr(config)}; choose one of "
                f"{', '.join(self._entries)}."
            )
        return self.get(config.registry_name)

    def from_json(self, values: Any) -> Config:
        """The config of a registered class, from what its `to_json` gives."""
        check_object(self.kind, values, ("name",))
        return self.get(values["name"]).config.from_json(values)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())
