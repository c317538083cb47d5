"""The command `inspect`: prints the history in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, say, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's group."""

    parser = add_command(
        commands,
        "inspect",
        run,
        "Print the history of an edited file: what was forgotten, when, how, and from which parent.",
    )
    parser.add_argument("file", type=Path, help="any file this package wrote")


def run(arguments: argparse.Namespace) -> None:
    from ..history.step_record import read_history
    from ..output.report import history_text

    history, source = read_history(arguments.file)
    say(history_text(arguments.file.name, history, source))
    write_json(arguments.json, {"source": source, "history": [vars(record) for record in history]})
