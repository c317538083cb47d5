"""Parameter groups: which weights a step may change, by the names that settings use for the roles of
weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..base.errors import ConfigError
from .family import Family

GROUPS = {
    "kv": "text_readers",
    "attn2": "cross_attention",
    "attn": "attention",
    "non-attn2": "no_cross_attention",
    "full": "all",
}
"""Name of a parameter group -> role of its weights."""

ROLES = frozenset(GROUPS.values())

READING_TEXT = ("kv", "attn2", "attn", "full")
"""Groups among whose weights are the text readers."""


def role_of(group: str) -> str:
    """The role of a parameter group's weights.

    Raises:
        ConfigError: there is no such group.
    """
    if group not in GROUPS:
        raise ConfigError(f"There is no parameter group {group!r}; choose one of {', '.join(GROUPS)}.")
    return GROUPS[group]


def keys_with_role(family: Family, role: str, keys: Iterable[str]) -> list[str]:
    """Those of the checkpoint keys that have a role, in their order.

    Raises:
        ConfigError: the family has no such role, or none of the keys has it.
    """
    if role not in family.roles:
        known = ", ".join(family.roles)
        raise ConfigError(f"{family.display_name} has no weights called {role!r}; choose one of {known}.")
    found = [key for key in keys if re.search(family.roles[role], key)]
    if not found:
        raise ConfigError(
            f"The role {role!r} selects no weight of this model; choose another parameter group."
        )
    return found
