"""The command `benchmark`: measures methods and presets on MiniCanvas."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import add_command, check_within, say, write_json

_SUITES = ("styles", "objects", "large_styles", "large_objects", "people")


def add(commands: Any) -> None:
    """Add the command to argparse's group."""

    parser = add_command(
        commands,
        "benchmark",
        run,
        "Measure methods and presets on MiniCanvas; an interrupted run resumes.",
    )
    parser.add_argument("--suite", choices=_SUITES, default="styles", help="world and domain of the targets")
    parser.add_argument(
        "--cells",
        nargs="*",
        metavar="CELL",
        help="presets, such as exact, or with a setting: 'plain ties'; 'exact undeclared' names no concept "
        "to keep; the paper's and ours if not given",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2], help="seeds of training and evaluation"
    )
    parser.add_argument(
        "--orders",
        nargs="+",
        metavar="LETTER",
        help="orders of the requests: a, b, or any letter for a random one; the shorter list of seeds and "
        "orders is repeated; a and b, one for each seed, if not given",
    )
    parser.add_argument(
        "--requests",
        type=int,
        help="number of requests; 12 styles or 6 objects if not given, up to 24 styles, which leave 12",
    )
    parser.add_argument(
        "--blind",
        choices=("names", "descriptions", "nothing"),
        default="names",
        help="made-up names of methods hold no word of the names that they are not told, nor of the "
        "descriptions; nothing: as in figures from before this option",
    )
    parser.add_argument("--pictures", type=int, default=1, help="images per style and object")
    parser.add_argument("--compare", choices=("paper",), help="print the paper's figures too")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes of one thread each; one per core, at most 8, if not given; 0 for this process alone",
    )
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="finished steps; in --out if not given")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark"), help="folder for results, chart and finished steps"
    )


def run(arguments: argparse.Namespace) -> None:
    from ..files.paths import check_writable
    from ..minicanvas.benchmark import Cell, grid, result_table, run_benchmark, write_figure
    from ..minicanvas.suites import SUITES

    suite = SUITES[arguments.suite]
    if arguments.requests is not None:
        check_within("--requests", arguments.requests, 1, suite.most)
    for order in arguments.orders or ():
        suite.order(order)
    check_within("--pictures", arguments.pictures, 1, 100)
    cells = [Cell.parse(name) for name in arguments.cells] if arguments.cells else grid()
    check_writable(arguments.out)

    def show(done: int, total: int, name: str) -> None:
        sys.stderr.write(f"{done} of {total} runs{f': {name}' if name else ''}\n")

    lines = run_benchmark(
        arguments.out,
        cells=cells,
        seeds=arguments.seeds,
        suite=suite,
        orders=arguments.orders,
        requests=arguments.requests,
        pictures=arguments.pictures,
        workers=arguments.workers,
        store=arguments.store,
        on_progress=show,
        blind=arguments.blind,
    )
    say(result_table(lines, arguments.compare == "paper"))
    figure = write_figure(lines, arguments.out)
    say(f"results: {(arguments.out / 'results.jsonl').resolve()}\nfigure: {figure.resolve()}")
    write_json(arguments.json, {"lines": lines})
