"""The command `sweep`: runs many independent commands on all cores or on a cluster."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import CheckpointError, ConfigError, brief_repr
from .common import add_command, say, write_json
from .engines import Command, engine_called

_RUNNABLE = ("unlearn", "audit", "benchmark")


def add(commands: Any) -> None:
    """Add the command to argparse's group."""
    parser = add_command(
        commands,
        "sweep",
        run,
        "Run independent commands (unlearn, audit, benchmark) on all cores, or on a cluster of Ray; an "
        "interrupted sweep resumes.",
    )
    parser.set_defaults(parsers=commands.choices)
    parser.add_argument(
        "plan", type=Path, help="text file with a command a line, such as: unlearn Lava --seed 1"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="what runs the commands; ray if it is installed",
    )
    parser.add_argument(
        "--workers", type=int, help="commands at a time with local; one per core if not given"
    )
    parser.add_argument("--address", help="of Ray's cluster; the one that runs here if not given")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("sweep"),
        help="folder for results, checkpoints and finished steps, which all machines share",
    )


@dataclass(frozen=True)
class _Job:
    """One command of a sweep, as it is written in the plan, and its folder."""

    words: tuple[str, ...]
    folder: Path

    @property
    def figures(self) -> Path:
        return self.folder / "figures.json"

    def command(self, store: Path) -> Command:
        """The command with the sweep's store and places of its results, where the plan names none."""
        given = {word for word in self.words if word.startswith("--")}
        more = {"--json": self.figures}
        if self.words[0] == "unlearn":
            more |= {"--store": store, "--out": self.folder / "model.safetensors"}
        elif self.words[0] == "benchmark":
            more |= {"--store": store, "--out": self.folder, "--workers": 0}
        added = [str(word) for option in more.items() if option[0] not in given for word in option]
        return Command((*self.words, *added), self.folder / "log.txt")

    def result(self) -> dict[str, Any] | None:
        """What the command has measured; None if it has not ended."""
        try:
            return json.loads(self.figures.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def run(arguments: argparse.Namespace) -> None:
    from ..base.config import stable_hash
    from ..files.paths import check_writable

    folder = arguments.out / "jobs"
    jobs = [
        _Job(words, folder / stable_hash(words)[:16])
        for words in _read_plan(arguments.plan, arguments.parsers)
    ]
    check_writable(arguments.out)
    missing = [job for job in dict.fromkeys(jobs) if job.result() is None]
    for job in missing:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "model.safetensors").unlink(missing_ok=True)  # of a job that was killed at its end
    failed = []
    if missing:
        engine = engine_called(arguments.engine, arguments.workers, arguments.address)
        commands = [job.command(arguments.out / "store") for job in missing]
        for done, (number, status) in enumerate(engine.run(commands), 1):
            job = missing[number]
            sys.stderr.write(f"{done} of {len(missing)}: {shlex.join(job.words)}\n")
            if status or job.result() is None:
                failed.append(job)
            _write_results(arguments.out, jobs)
    _write_results(arguments.out, jobs)
    say(f"results: {(arguments.out / 'results.jsonl').resolve()}")
    write_json(arguments.json, {"jobs": len(jobs), "failed": [shlex.join(job.words) for job in failed]})
    if failed:
        raise CheckpointError(
            f"{len(failed)} of {len(jobs)} commands failed, the first is {shlex.join(failed[0].words)!r}; "
            f"read {str(failed[0].folder / 'log.txt')!r}, and run the sweep again."
        )


def _read_plan(path: Path, parsers: Mapping[str, argparse.ArgumentParser]) -> list[tuple[str, ...]]:
    """The words of every command of a plan; a benchmark becomes one command for each of its runs.

    Args:
        path: of the plan.
        parsers: name of a command -> its parser.

    Raises:
        ConfigError: the file cannot be read, or a line is no command that a sweep runs.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The plan {path.name!r} cannot be read ({error}); give a text file.") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(
                f"Line {number} of {path.name!r} is {brief_repr(line)} ({error}); mend it."
            ) from error
        if words:
            found += _runs(words, parsers, f"Line {number} of {path.name!r}")
    if not found:
        raise ConfigError(f"The plan {path.name!r} has no command; give one a line.")
    return found


def _runs(
    words: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser], where: str
) -> Iterator[tuple[str, ...]]:
    if words[0] not in _RUNNABLE:
        raise ConfigError(f"{where} begins with {words[0]!r}; a sweep runs {', '.join(_RUNNABLE)}.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = parsers[words[0]].parse_args(list(words[1:]))
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("\n")[2]
        raise ConfigError(f"{where} is no valid command ({brief_repr(reason)}); mend it.") from error
    if words[0] != "benchmark":
        yield tuple(words)
        return
    from ..minicanvas.benchmark import grid, run_pairs

    cells = parsed.cells or [cell.name for cell in grid()]
    for seed, order in run_pairs(parsed.seeds, parsed.orders):
        for cell in cells:
            one = [
                "benchmark",
                "--suite",
                parsed.suite,
                "--cells",
                cell,
                "--seeds",
                str(seed),
                "--orders",
                order,
            ]
            one += ["--pictures", str(parsed.pictures), "--blind", parsed.blind]
            yield tuple(one + (["--requests", str(parsed.requests)] if parsed.requests else []))


def _write_results(out: Path, jobs: Sequence[_Job]) -> None:
    """Write a line for every command that has ended, in the plan's order; benchmarks have their own too."""
    from ..files.atomic_write import write_atomically

    ended = [(job, result) for job in jobs if (result := job.result()) is not None]
    lines = [{"command": shlex.join(job.words), **result} for job, result in ended]
    measured = [line for job, result in ended if job.words[0] == "benchmark" for line in result["lines"]]
    for name, values in (("results.jsonl", lines), ("benchmark.jsonl", measured)):
        if values:
            data = "".join(json.dumps(value) + "\n" for value in values).encode()
            write_atomically(out / name, lambda file, data=data: file.write(data))
