"""The command `merge`: merges edited checkpoints into one."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..base.errors import ConfigError, brief_repr
from .common import add_command, check_can_write, say, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's group."""
    from ..mergers import MERGERS
    from ..minicanvas.models import CHECKPOINT_PATH

    methods = ", ".join(entry.name for entry in MERGERS)
    parser = add_command(
        commands,
        "merge",
        run,
        "Merge checkpoints edited from the same file into one that has forgotten the targets of all.",
    )
    parser.add_argument("file", nargs="+", type=Path, help="edited checkpoints to merge")
    parser.add_argument(
        "--pretrained",
        type=Path,
        default=CHECKPOINT_PATH,
        help="the checkpoint that all of them were made from",
    )
    parser.add_argument("--how", default="ties", help=f"merging method: one of {methods}")
    parser.add_argument(
        "--strength", type=float, help="factor of the merged change; for ties and task_arithmetic"
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="WEIGHT",
        help="factor of each file; for ties and task_arithmetic",
    )
    parser.add_argument(
        "--keep-fraction", type=float, help="share of the largest changes that is kept of each file; for ties"
    )
    parser.add_argument("--trim", help="tensor or global: what the share is taken of; for ties")
    parser.add_argument("--function", help="mean, sum or max of the changes of the elected sign; for ties")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("merged.safetensors"),
        help="file to write; an existing file is never overwritten",
    )


def run(arguments: argparse.Namespace) -> None:
    from ..base.errors import ModelError
    from ..history.step_record import read_history
    from ..mergers import MERGERS
    from ..mergers.merge import merge
    from ..models.source import source_of
    from ..output.checkpoint import open_model, save_checkpoint
    from ..output.report import merge_text

    entry = MERGERS.get(arguments.how)
    options = {
        option: getattr(arguments, option)
        for option in ("strength", "weights", "keep_fraction", "trim", "function")
    }
    values = {option: value for option, value in options.items() if value is not None}
    for option in values:
        if option not in {field.name for field in fields(entry.config)}:
            raise ConfigError(
                f"--{option.replace('_', '-')} is {brief_repr(values[option])}, which {entry.name} does not "
                "use; leave it out."
            )
    config = entry.config.from_json(values)
    check_can_write(arguments.out, arguments.json)
    original = source_of(arguments.pretrained)
    for file in arguments.file:
        _, made_from = read_history(file)
        if made_from is None:
            raise ModelError(
                f"{file.name!r} is no checkpoint that continual-unlearning has edited; leave it out."
            )
        if made_from["sha256"] != original.sha256:
            raise ModelError(
                f"{file.name!r} was made from {brief_repr(made_from['name'])} and not from "
                f"{original.path.name!r}; give the file that all of them were made from as --pretrained."
            )
    check_can_write(arguments.out, size=original.size)
    merged = merge([open_model(file, original.path) for file in arguments.file], config)
    path = save_checkpoint(merged, arguments.out, on_message=say)
    record = merged.history[-1]
    say(merge_text(merged))
    say(f"checkpoint: {path.resolve()}")
    write_json(
        arguments.json, {"checkpoint": str(path.resolve()), "seconds": record.seconds, **record.request}
    )
