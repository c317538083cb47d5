"""The command `demo`: compares two chains of requests on MiniCanvas."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import ProgressLine, add_command, check_can_write, check_within, say, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's group."""

    parser = add_command(
        commands,
        "demo",
        run,
        "Forget styles of MiniCanvas one after another, with the presets plain and recommended, and compare.",
    )
    parser.add_argument("--requests", type=int, default=12, help="number of styles, 1 to 12")
    parser.add_argument("--order", choices=("a", "b"), default="a", help="order of the requests")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and evaluation")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for images and checkpoint")
    parser.add_argument(
        "--workers", type=int, help="processes of one thread each; one per core, at most 4, if not given"
    )


def run(arguments: argparse.Namespace) -> None:
    from ..audits.classifier_scores import table
    from ..files.paths import check_writable
    from ..minicanvas.demo import run_demo

    check_within("--requests", arguments.requests, 1, 12)
    check_within("--workers", 1 if arguments.workers is None else arguments.workers, 1, 64)
    check_writable(arguments.out)
    check_can_write(arguments.json)
    result = run_demo(
        arguments.out,
        requests=arguments.requests,
        seed=arguments.seed,
        order=arguments.order,
        workers=arguments.workers,
        on_progress=ProgressLine(),
    )
    runs = result["runs"]
    rows = [("untouched", result["base"])]
    rows += [(f"{run} after {k}", runs[run]["after"][k]) for k in runs["plain"]["after"] for run in runs]
    say(table(rows))
    for run, values in runs.items():
        say(f"{run}: {values['seconds_per_request']:.1f} s per request")
    for name, path in result["files"].items():
        say(f"{name}: {path}")
    write_json(arguments.json, result)
