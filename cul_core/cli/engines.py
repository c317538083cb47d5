"""Engines that run independent commands of this package on many processes or machines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..base.errors import ConfigError

_TRIES = 20
"""How often a command is started whose process is killed; it goes on from what its store has."""
_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Command:
    """A command of this package, without `python -m cul_core`, and the file that its output is added to."""

    words: tuple[str, ...]
    log: Path


class Engine(Protocol):
    """Runs commands, each in a process of its own; one whose process is killed is started again."""

    def run(self, commands: Sequence[Command]) -> Iterator[tuple[int, int]]:
        """(number of a command, its exit status) of each command when it ends."""


class LocalEngine:
    """Runs commands on this machine.

    Args:
        workers: commands at a time.
        program: what runs a command.
    """

    def __init__(self, workers: int, program: Sequence[str] = (sys.executable, "-m", "cul_core")):
        self._workers, self._program = workers, program

    def run(self, commands: Sequence[Command]) -> Iterator[tuple[int, int]]:
        with ThreadPoolExecutor(self._workers) as pool:
            jobs = {pool.submit(self._run, command): number for number, command in enumerate(commands)}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _run(self, command: Command) -> int:
        paths = os.pathsep.join(filter(None, (str(_PACKAGE), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        for _ in range(_TRIES):
            with command.log.open("ab") as log:
                status = subprocess.run(
                    [*self._program, *command.words], stdout=log, stderr=log, env=environment
                ).returncode
            if status >= 0:
                break
        return status


class RayEngine:
    """Runs commands on a cluster of Ray, whose machines share the folders that the commands name.

    Args:
        address: of the cluster; None starts one on this machine if none runs.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, address: str | None = None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"The engine ray needs the package ray; run: {sys.executable} -m pip install ray"
            ) from error
        variables = {"PYTHONPATH": str(_PACKAGE), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._ray = ray
        try:
            ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"The cluster of Ray at {address!r} does not answer ({error}); check --address."
            ) from error

    def run(self, commands: Sequence[Command]) -> Iterator[tuple[int, int]]:
        task: Any = self._ray.remote(num_cpus=1, max_retries=-1)(run_here)
        running = {
            task.remote(list(command.words), str(command.log.resolve()), os.getcwd()): number
            for number, command in enumerate(commands)
        }
        try:
            while running:
                (done,), _ = self._ray.wait(list(running), num_returns=1)
                yield running.pop(done), self._ray.get(done)
        finally:
            for job in running:
                self._ray.cancel(job)
            self._ray.shutdown()


def run_here(words: list[str], log: str, folder: str) -> int:
    """Exit status of a command in this process, started in `folder`; what it says is added to the log."""
    main = import_module(__package__).main  # by name: the package imports this module

    os.chdir(folder)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return main(words)
        except SystemExit as error:  # argparse's
            return int(error.code or 0)


def engine_called(name: str, workers: int | None, address: str | None) -> Engine:
    """The engine `local` or `ray`."""
    if name == "ray":
        return RayEngine(address)
    return LocalEngine(workers or os.cpu_count() or 1)
