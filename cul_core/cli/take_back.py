"""The command `take-back`: takes exact requests back and writes the checkpoint without them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import (
    ProgressLine,
    add_command,
    add_lora,
    add_tokenizer,
    check_can_write,
    check_within,
    say,
    usable_device,
    write_json,
    write_lora,
)


def add(commands: Any) -> None:
    """Add the command to argparse's group."""
    from ..minicanvas.models import CHECKPOINT_PATH

    parser = add_command(
        commands,
        "take-back",
        run,
        "Take back requests that were solved in closed form, as the presets recommended and exact do: the "
        "checkpoint is written as if they had never been made.",
    )
    parser.add_argument("name", nargs="+", help='forgotten concept to take back, such as "Candy Stripes"')
    parser.add_argument("--model", type=Path, required=True, help="edited checkpoint; it is not changed")
    parser.add_argument(
        "--pretrained", type=Path, default=CHECKPOINT_PATH, help="the checkpoint that it was made from"
    )
    add_tokenizer(parser)
    parser.add_argument(
        "--device", default="cpu", help="PyTorch's name of the device to encode text on: cpu, cuda, mps"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("taken-back.safetensors"),
        help="file to write; an existing file is never overwritten",
    )
    add_lora(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..models.load_diffusers import NetworkCache
    from ..output.checkpoint import open_model, save_checkpoint
    from ..output.report import take_back_text
    from ..training.solved_chain import forgotten_names, take_back

    check_can_write(arguments.out, arguments.lora, arguments.json)
    check_within("--lora-rank", arguments.lora_rank, 1, 1024)
    device = usable_device(arguments.device)
    model = open_model(arguments.model, arguments.pretrained)
    networks = NetworkCache(arguments.tokenizer)
    left = take_back(model, arguments.name, device=device, networks=networks, on_stage=ProgressLine().stage)
    path = save_checkpoint(left, arguments.out)
    say(take_back_text(model, left))
    say(f"checkpoint: {path.resolve()}")
    lora = write_lora(left, arguments) if left.edits else {}
    (former, _), (exact, trained) = forgotten_names(model), forgotten_names(left)
    figures = {
        "taken_back": [name for name in former if name not in exact],
        "can_be_taken_back": exact,
        "cannot_be_taken_back": trained,
    }
    write_json(arguments.json, {"checkpoint": str(path.resolve()), **figures, **lora})
