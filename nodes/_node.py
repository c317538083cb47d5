"""The base of all our nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.v0_0_2 import io

from ..cul_core.base.config import check_number
from ..cul_core.base.errors import ConfigError, CulError, brief_repr
from ._host import with_history
from ._types import CARRIED, CulModel


@functools.cache
def _short_named(kind: type[CulError]) -> type[CulError]:
    """The same error under its bare name: hosts show a class with its module, which for a node pack is a path
    on the disk."""
    return type(kind.__name__, (kind,), {"__module__": "builtins"})


def search_aliases(*words: str) -> dict[str, list[str]]:
    """Words by which the page finds a node, as an argument of `io.Schema`; none on hosts that know no aliases."""
    return {"search_aliases": list(words)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}


class UnlearningNode(io.ComfyNode):
    """A node whose errors begin, in the host's dialog, with what is wrong."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        own = cls.__dict__.get("execute")
        # hosts make locked copies of the class, wrapped already
        if own is not None and not hasattr(own.__func__, "__wrapped__"):
            cls.execute = classmethod(_with_short_errors(own.__func__))


def _with_short_errors(execute: Callable) -> Callable:
    @functools.wraps(execute)
    def run(cls: type, *arguments: Any, **values: Any) -> io.NodeOutput:
        try:
            return execute(cls, *arguments, **_checked(cls, values))
        except CulError as error:
            raise _short_named(type(error))(*error.args) from error

    return run


def _checked(cls: type[io.ComfyNode], values: dict[str, Any]) -> dict[str, Any]:
    """The inputs without those that are not connected, and a MODEL's history where one is asked for. Hosts
    check neither what comes over links, nor NaN, nor sockets given a constant.

    Raises:
        ConfigError: one is not of its type, or a number is not between its limits.
        ModelError: a MODEL has no history.
    """
    for entry in (cls.SCHEMA or cls.GET_SCHEMA()).inputs:
        value, types = values.get(entry.id), entry.get_io_type().split(",")
        if CulModel.io_type in types and isinstance(value, CARRIED["MODEL"]):
            value = values[entry.id] = with_history(value)
        kind = CARRIED.get(types[0])
        if entry.id not in values or kind is None or (value is None and entry.optional):
            continue
        if kind in (int, float):
            check_number(entry.id, value, entry.min, entry.max, kind)
        elif type(value) is not kind if kind in (str, bool) else not isinstance(value, kind):
            raise ConfigError(f"{entry.id} is {brief_repr(value)}; give or connect a {' or '.join(types)}.")
    return {name: value for name, value in values.items() if value is not None}
