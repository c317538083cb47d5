"""Counts what one image takes of each family's network, and writes it where `training.memory_plan` finds it.

    python benchmarks/count_passes.py

A count takes a quarter of a minute to a minute, which no user should wait for before a step begins. Run it
anew when a family's network, its frozen layers or the counting itself changes; `pytest -m slow` compares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # count this library, not an installed one

from cul_core.models.build_diffusers import build_unet
from cul_core.models.diffusers_network import DiffusersNetwork
from cul_core.models.recognize import FAMILIES
from cul_core.training.memory_plan import count_passes, network_hash, table_key, table_path

GROUPS = ("kv",)
"""Groups that presets train on these families most; others are counted when a step asks."""


def main() -> None:
    for family in FAMILIES.values():
        if family.is_small:
            continue
        network, table = DiffusersNetwork(family, build_unet(family), (), None, None), {}
        for dtype in (torch.bfloat16, torch.float32):
            for group in GROUPS:
                for is_checkpointed in (False, True):
                    passes = count_passes(network.blank(dtype), group, 1, is_checkpointed)
                    table[table_key(dtype, group, is_checkpointed)] = asdict(passes)
        values = {"network": network_hash(family), "passes": table}
        table_path(family).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
