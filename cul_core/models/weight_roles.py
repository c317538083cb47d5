"""Parameter groups by name rule: which weights of a UNet a step may change."""

from __future__ import annotations

import re

from torch import nn

from ..base.errors import ConfigError

GROUPS = {
    "kv": r"\.attn2\.to_[kv]\.weight$",  # ESD: esd-x-strict; CUIG: kv-xattn
    "attn2": r"\.attn2\.",
    "attn": r"\.attn[12]\.to_(q|k|v|out)\b",  # CUIG calls this xattn
    "non-attn2": r"^(?!.*\.attn2\.)",
    "full": r"",
}


def group_names(unet: nn.Module, group: str) -> list[str]:
    """Names of the parameters in `group`, in model order.

    Raises:
        ConfigError: unknown group, or one that selects nothing in this model.
    """
    if group not in GROUPS:
        raise ConfigError(f"There is no parameter group {group!r}; choose one of {', '.join(GROUPS)}.")
    names = [name for name, _ in unet.named_parameters() if re.search(GROUPS[group], name)]
    if not names:
        raise ConfigError(f"Parameter group {group!r} selects no weight of this model; choose another group.")
    return names


def reads_text(name: str) -> bool:
    """Whether a parameter reads text embeddings directly: a cross-attention key or value matrix, (out, d)."""
    return re.search(GROUPS["kv"], name) is not None
