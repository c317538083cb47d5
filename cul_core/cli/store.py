"""The command `store`: shows or clears a store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..base.errors import ConfigError
from .common import add_command, say, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's group."""

    parser = add_command(
        commands, "store", run, "Show the finished and unfinished steps in a store, or clear it."
    )
    parser.add_argument("--folder", type=Path, default=Path("store"), help="folder of the store")
    parser.add_argument(
        "--clear",
        nargs="?",
        const="all",
        choices=("steps", "anchors", "states", "texts", "all"),
        help="what to remove; files of running steps stay",
    )


def run(arguments: argparse.Namespace) -> None:
    from ..store.steps import PARTS, StepStore

    if not arguments.folder.is_dir():
        raise ConfigError(
            f"There is no folder {str(arguments.folder)!r}; give the one that unlearn --store or a "
            "benchmark has made."
        )
    store = StepStore(arguments.folder)
    if arguments.clear:
        say(store.clear(*(PARTS if arguments.clear == "all" else [arguments.clear])))
    say(store.describe())
    write_json(
        arguments.json, {part: {path.name: size for _, size, path in store.files(part)} for part in PARTS}
    )
