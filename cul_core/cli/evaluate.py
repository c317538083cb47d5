"""The command `evaluate`: scores a checkpoint by its family's classifier."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import ProgressLine, add_command, check_within, say, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's group."""

    parser = add_command(
        commands, "evaluate", run, "Score a MiniCanvas checkpoint: forgetting and retention."
    )
    parser.add_argument("model", type=Path, help="checkpoint to score")
    parser.add_argument(
        "--target", nargs="*", help="forgotten styles or objects; those in the file's history if not given"
    )
    parser.add_argument("--pictures", type=int, default=1, help="images per style and object")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")


def run(arguments: argparse.Namespace) -> None:
    from ..audits.classification import classifier_of
    from ..audits.classifier_scores import table
    from ..models.load_diffusers import NetworkCache
    from ..output.checkpoint import open_model

    check_within("--pictures", arguments.pictures, 1, 1000)
    model = open_model(arguments.model)
    classifier = classifier_of(model.family)
    classifier.check(arguments.target or ())
    names = arguments.target or [concept["target"] for concept in model.forgotten]
    show, total = ProgressLine(), classifier.count(names, arguments.pictures)
    scores = classifier.evaluate(
        NetworkCache().get(model.source),
        model,
        names,
        seed=arguments.seed,
        per_cell=arguments.pictures,
        on_batch=lambda done: show(min(done / total, 1), 0.085 * max(total - done, 0)),
    )
    values = scores.to_json()
    say(table([(arguments.model.name, values)]))
    spread = (f"{name} {low:.1f}-{high:.1f}" for name, (low, high) in scores.intervals.items())
    say("95 % intervals: " + ", ".join(spread))
    for name, row in scores.per_concept.items():
        say(
            f"{name:28}{row['role']:10} style {row['style']:5.1f}  object {row['object']:5.1f}  "
            f"({row['pictures']} images)"
        )
    write_json(arguments.json, values)
