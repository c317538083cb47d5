"""The command line, `python -m cul_core COMMAND`; every command is a file of this package."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..base.errors import Cancelled, CulError
from . import audit, benchmark, demo, evaluate, inspect, merge, store, sweep, take_back, unlearn

_COMMANDS = (demo, unlearn, take_back, merge, evaluate, audit, benchmark, sweep, store, inspect)
_EXIT_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The argparse parser with all commands."""
    top = argparse.ArgumentParser(
        prog="cul_core", description="Make a text-to-image model forget, one request after another."
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of one command: 0, 2 after a user error with one line on stderr, 130 when interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a terminal's encoding may lack letters of a name
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments.run(arguments)
    except CulError as error:
        sys.stderr.write(f"error: {error}\n")
        return _EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {Cancelled('Cancelled; nothing was written.')}\n")
        return 130
    return 0
