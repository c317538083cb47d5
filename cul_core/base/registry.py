"""Registries of classes, from which nodes, help pages, the command line and common tests make their lists."""

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
    """One registered class, its config, and the texts that users see."""

    name: str
    cls: type[T]
    config: type[Config]
    display_name: str
    description: str
    paper: str


class Registry(Generic[T]):
    """Registered classes by name; error messages call them by `kind` ("method", "regularizer")."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, **details: Any) -> Callable[[type[T]], type[T]]:
        """Decorator that registers a class: `@METHODS.register("conabl", config=ConAblConfig, ...)`.

        Args:
            name: lower_snake_case and unique.
            details: the other fields of `Entry`.

        Raises:
            ConfigError: the name is taken or not lower_snake_case.
        """
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
        """The entry of a registered name.

        Raises:
            ConfigError: no class has that name.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(
                f"There is no {self.kind} {brief_repr(name)}; choose one of {', '.join(self._entries)}."
            )
        return self._entries[name]

    def find(self, name: str) -> Entry[T] | None:
        """The entry of a name, as it stands in a file; None if no class has it."""
        return self._entries.get(name)

    def of(self, config: Config) -> Entry[T]:
        """The entry whose config class `config` is of.

        Raises:
            ConfigError: it is no config, or not of a registered class.
        """
        if not isinstance(config, Config):
            raise ConfigError(
                f"The {self.kind} is {brief_repr(config)}, which is no config; choose one of "
                f"{', '.join(self._entries)}."
            )
        return self.get(config.registry_name)

    def from_json(self, values: Any) -> Config:
        """The config of a registered class, from the JSON that its `to_json` wrote.

        Raises:
            ConfigError: the JSON names no registered class, or has an invalid setting.
        """
        check_object(self.kind, values, ("name",))
        return self.get(values["name"]).config.from_json(values)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())
