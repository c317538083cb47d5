"""The command `audit`: runs a registered audit on an edited checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..base.config import Config
from .common import JSON_HELP, ProgressLine, add_command, say, write_json


def add(commands: Any) -> None:
    """Add the command to argparse's group, with a subcommand for every registered audit."""
    from ..audits import AUDITS
    from ..audits.base import BUDGETS
    from ..models.source import PREDICTIONS

    parser = add_command(
        commands, "audit", run, "Test an edited checkpoint for what it should have forgotten."
    )
    audits = parser.add_subparsers(required=True, metavar="AUDIT", dest="audit")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    for entry in AUDITS:
        audit = audits.add_parser(entry.name, help=entry.description, formatter_class=formatter)
        audit.add_argument("model", type=Path, help="checkpoint to audit")
        audit.add_argument(
            "--pretrained",
            type=Path,
            help="the checkpoint that the edited one was made from; its weights then count as W0",
        )
        audit.add_argument(
            "--tokenizer", type=Path, metavar="FOLDER", help="folder with CLIP's vocab.json and merges.txt"
        )
        audit.add_argument(
            "--prediction",
            choices=PREDICTIONS,
            default="auto",
            help="what the model predicts; auto: as its file says",
        )
        audit.add_argument(
            "--target",
            nargs="*",
            default=[],
            help="forgotten concepts; those in the file's history if not given",
        )
        audit.add_argument(
            "--budget",
            choices=BUDGETS,
            default="standard",
            help="how long to search; sets what is not given below",
        )
        # also behind the audit's name; without a default, which would undo one before it
        audit.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=JSON_HELP)
        _add_settings(audit, entry.config())


def _add_settings(parser: argparse.ArgumentParser, defaults: Config) -> None:
    for field in fields(defaults):
        rules, default = field.metadata, getattr(defaults, field.name)
        option = f"--{field.name.replace('_', '-')}"
        text = f"{rules['help']} Standard: {default!r}."
        if isinstance(default, bool):
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            choices = rules.get("choices")
            parser.add_argument(
                option, type=type(default), choices=choices, default=argparse.SUPPRESS, help=text
            )


def run(arguments: argparse.Namespace) -> None:
    from ..audits import AUDITS
    from ..concepts.parsing import parse_concept
    from ..models.load_diffusers import NetworkCache
    from ..output.checkpoint import open_model

    entry = AUDITS.get(arguments.audit)
    given = {
        field.name: vars(arguments)[field.name] for field in fields(entry.config) if field.name in arguments
    }
    config = entry.config.of(arguments.budget, **given)
    model = open_model(arguments.model, arguments.pretrained, arguments.prediction)
    show, network = ProgressLine(), NetworkCache(arguments.tokenizer).get(model.source)
    concepts = [parse_concept(target) for target in arguments.target]
    report = entry.cls(config).run(network, model, concepts, lambda done, total: show(done / total, 0.0))
    say(f"{report.verdict}\n{report.text}")
    figures = {name: asdict(figure) for name, figure in report.figures.items()}
    write_json(arguments.json, {"verdict": report.verdict, "figures": figures})
