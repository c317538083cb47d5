"""Shared by the commands: output, checks of options, and adding a command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import ConfigError, brief_repr

if TYPE_CHECKING:
    import torch

    from ..history.unlearn_model import UnlearnModel

JSON_HELP = "also write the figures to this file"


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    """The parser of a new command with the option `--json`; `commands` is argparse's group."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(name, help=help, description=help, formatter_class=formatter)
    parser.set_defaults(run=run)
    parser.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    return parser


def say(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add the option `--tokenizer`."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with CLIP's vocab.json and merges.txt, for Stable Diffusion",
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Add the options `--lora` and `--lora-rank`; see `write_lora`."""
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        help="also write the edit as a LoRA: exactly where it changes few text directions, as without "
        "training, else approximately",
    )
    parser.add_argument("--lora-rank", type=int, default=16, help="rank of an approximation")


def write_lora(model: UnlearnModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the LoRA that `--lora` asks for, and say what it keeps; its figures, or none if not asked for."""
    if arguments.lora is None:
        return {}
    from ..output.lora import save_lora

    saved = save_lora(model, arguments.lora, arguments.lora_rank)
    say(f"LoRA: {saved.path.resolve()} ({saved.sentence})")
    figures = {"energy": saved.energy, "rank": saved.rank, "size_bytes": saved.size_bytes}
    return {"lora": {"path": str(saved.path.resolve()), "is_exact": saved.is_exact, **figures}}


class ProgressLine:
    """Progress on stderr: on a terminal one line rewritten in place, in a log a line per tenth.

    Args:
        is_silent: whether nothing is written, because another process does.
    """

    def __init__(self, is_silent: bool = False):
        self._last_tenth, self._is_silent = -1, is_silent

    def __call__(self, share: float, seconds_left: float) -> None:
        if self._is_silent:
            return
        text = f"{100 * share:3.0f} %, {int(seconds_left // 60)}:{int(seconds_left % 60):02d} left"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text}   " + ("\n" if share >= 1 else ""))
        elif int(10 * share) > self._last_tenth:
            self._last_tenth = int(10 * share)
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def stage(self, text: str) -> None:
        """Show what is being done, on a terminal only."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()

    def tell(self, text: str) -> None:
        """Write a message on a line of its own."""
        if self._is_silent:
            return
        sys.stderr.write(("\r" if sys.stderr.isatty() else "") + text + "\n")
        sys.stderr.flush()


def write_json(path: Path | None, values: dict) -> None:
    """Write the values atomically, if a path is given."""
    if path is not None:
        from ..files.atomic_write import write_atomically

        data = (json.dumps(values, indent=1) + "\n").encode()
        write_atomically(path, lambda file: file.write(data))


def check_can_write(*files: Path | None, size: int = 0) -> None:
    """Rehearse the writing of these files, before hours of work depend on it.

    Args:
        files: paths of the files; None is left out.
        size: bytes of each, as far as they are known.

    Raises:
        CheckpointError: see `rehearse`.
    """
    from ..files.atomic_write import rehearse

    for file in files:
        if file is not None:
            rehearse(file, size)


def check_within(option: str, value: int, low: int, high: int) -> None:
    """Check that an option's value is from `low` to `high`.

    Raises:
        ConfigError: it is not.
    """
    if not low <= value <= high:
        raise ConfigError(f"{option} is {value}; give a number between {low} and {high}.")


def usable_device(name: str) -> torch.device:
    """The device of this name, with its index.

    Raises:
        ConfigError: PyTorch cannot allocate there.
    """
    import torch

    try:
        return torch.empty(0, device=name).device
    # an unknown name, no such device, or PyTorch built without its support
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"--device is {brief_repr(name)}, which PyTorch cannot use here ({brief_repr(reason)}); give "
            "cpu or a device of this machine."
        ) from error
