"""Parameter groups: the names by which settings say which weights a step trains, and their roles."""

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
    "text": "reads_text",
    "text-kv": "text_kv",
    "text-stream": "text_stream",
}
"""Name of a parameter group -> role of its weights."""

ROLES = frozenset(GROUPS.values())

READING_TEXT = ("kv", "attn2", "attn", "full", "text")
"""Parameter groups that contain the text readers."""


def role_of(group: str) -> str:
    """The role of a parameter group's weights.

    Raises:
        ConfigError: the group is unknown.
    """
    if group not in GROUPS:
        raise ConfigError(f"There is no parameter group {group!r}; choose one of {', '.join(GROUPS)}.")
    return GROUPS[group]


def keys_with_role(family: Family, role: str, keys: Iterable[str]) -> list[str]:
    """The checkpoint keys whose weights have a role, in the given order.

    Raises:
        ConfigError: the family does not have the role, or no key has it.
    """
    if role not in family.roles:
        known = ", ".join(family.roles)
        raise ConfigError(f"{family.display_name} has no weights called {role!r}; choose one of {known}.")
    selected = [key for key in keys if re.search(family.roles[role], key)]
    if not selected:
        raise ConfigError(
            f"The role {role!r} selects no weight of this model; choose another parameter group."
        )
    return selected
