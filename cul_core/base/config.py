"""Frozen settings with checked values, a JSON round trip and a stable hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import ConfigError, brief_repr

_LARGEST = {int: 2**31 - 1, float: 1e12}
_LONGEST_TEXT = 100_000
"""Characters: room for a thousand names of a hundred characters each."""


def canonical_json(value: Any) -> str:
    """JSON text of `value` with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def stable_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Config:
    """Base of all settings: JSON round trip, and checks of choices and ranges at construction.

    A field's metadata may hold `choices` (tuple), `minimum`, `maximum` and `help`; nodes and the command line
    read them too. A field with `added_later` is left out of the JSON while it has its default, so that
    configs hashed before the field existed keep their hash.

    Raises:
        ConfigError: a value is not among its choices or outside its range, or a JSON key is unknown.
    """

    registry_name: ClassVar[str] = ""
    SHARED: ClassVar[tuple[str, ...]] = ()
    """Settings that all requests of a chain share, of a method that solves them together."""
    results_version: ClassVar[int] = 1
    """Incremented when the same settings give another result, so that stored steps are trained anew."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rules = getattr(self, field.name), field.metadata
            if (
                "help" in rules
                and type(value) is not type(field.default)
                and (type(value), type(field.default)) != (int, float)
            ):
                raise ConfigError(
                    f"{field.name} is {brief_repr(value)}; give a value of type "
                    f"{type(field.default).__name__}."
                )
            if "choices" in rules and value not in rules["choices"]:
                choices = ", ".join(map(str, rules["choices"]))
                raise ConfigError(f"{field.name} is {brief_repr(value)}; choose one of {choices}.")
            if "help" in rules and isinstance(value, str) and len(value) > _LONGEST_TEXT:
                raise ConfigError(f"{field.name} has {len(value)} characters; give at most {_LONGEST_TEXT}.")
            if "help" in rules and type(value) in _LARGEST:
                check_number(field.name, value, *limits(field))

    def to_json(self) -> dict[str, Any]:
        """JSON object of the settings, with the registered name under `name` if there is one."""
        values = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if not (field.metadata.get("added_later") and getattr(self, field.name) == field.default)
        }
        return {"name": self.registry_name, **values} if self.registry_name else values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> typing.Self:
        """The config that `to_json` wrote.

        Raises:
            ConfigError: the JSON is of another config, lacks a setting, or has an unknown or invalid one.
        """
        check_object(f"JSON of a {cls.__name__}", values)
        if values.get("name", cls.registry_name) != cls.registry_name:
            raise ConfigError(
                f"The JSON of a {cls.__name__} has the name {brief_repr(values['name'])}, "
                "which is another config's; give its own."
            )
        values = {key: value for key, value in values.items() if key != "name"}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := values.keys() - known:
            raise ConfigError(
                f"{cls.__name__} has no setting {brief_repr(min(map(str, unknown)))}; it has "
                f"{', '.join(sorted(known))}."
            )
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ConfigError(f"The JSON of a {cls.__name__} lacks the setting {field.name!r}; add it.")
        return cls(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )


def check_object(what: str, values: Any, needed: Iterable[str] = ()) -> None:
    """Check that `values` is a JSON object with the needed keys.

    Raises:
        ConfigError: it is another type, or lacks a key; `what` names it in the message.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"The {what} is {brief_repr(values)}; give an object.")
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"The {what} lacks {missing[0]!r}; give it.")


def check_number(name: str, value: Any, low: float | None, high: float | None, kind: type = float) -> None:
    """Check that `value` is a finite number between two limits (None for no limit).

    Args:
        name: what the message calls it.
        value: the number.
        low: least allowed value.
        high: largest allowed value.
        kind: `int`, or `float`, which allows integers too.

    Raises:
        ConfigError: another type, NaN, infinite, or outside the limits.
    """
    if type(value) not in (int, kind):
        raise ConfigError(f"{name} is {brief_repr(value)}; give a value of type {kind.__name__}.")
    if (
        not (-math.inf if low is None else low) <= value <= (math.inf if high is None else high)
        or abs(value) == math.inf
    ):
        raise ConfigError(f"{name} is {brief_repr(value)}; give a number between {low} and {high}.")


def limits(field: dataclasses.Field) -> tuple[float, float]:
    """(least, largest) value of a number setting; without limits of its own, bounds that are safe to compute
    with."""
    largest = _LARGEST[type(field.default)]
    return field.metadata.get("minimum", -largest), field.metadata.get("maximum", largest)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    added_later: bool | None = None,
) -> Any:
    """A dataclass field with a default, a help text for tooltips, and its allowed values.

    The default of a field with `added_later` must never change: `Config` leaves it out of the JSON.
    """
    rules = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "added_later": added_later,
    }
    return dataclasses.field(default=default, metadata={k: v for k, v in rules.items() if v is not None})
