"""A program that is killed at any moment loses nothing: the next run goes on to the same bits, and files are
whole or absent."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cul_core.files.safetensors_format import read_header, read_sealed

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
KILLS = 100

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def crash(folder, *arguments):
    done = subprocess.run(
        [sys.executable, str(HERE / "crash.py"), str(folder), *map(str, arguments)],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["problems"] == [], done.stderr[-4000:]
    return result


def test_a_chain_that_is_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path, count):
    died = crash(tmp_path, 1, "kill", KILLS)["died"]
    assert sum(died.values()) >= KILLS
    phases = (
        "anchors",
        "preparation",
        "updates",
        "writing a state",
        "writing a result",
        "evicting",
        "writing the checkpoint",
    )
    assert all(died.get(phase) for phase in phases), died
    for phase, number in died.items():
        count(f"kill while {phase}", number)
    count("kill", sum(died.values()))


def test_a_chain_whose_writes_fail_gives_its_result_and_the_next_run_works(tmp_path, count):
    result = crash(tmp_path, 1, "fail", errno.ENOSPC, 4)
    assert result["writes"] > 500 and result["survived"] == 4
    count("chain on a full disk", result["survived"])


PROGRAM = (
    "import sys; from cul_core.store import steps; steps.EVERY_SECONDS = 0; from cul_core.cli import main; "
    "sys.exit(main())"
)


def started(folder, out):
    """`unlearn` in a fresh process that keeps its state after every update."""
    arguments = [
        "unlearn",
        "Lava",
        "--preset",
        "plain",
        "--iterations",
        "12",
        "--anchor-steps",
        "3",
        "--store",
        folder / "store",
        "--out",
        out,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def stored(folder, part):
    """(changes of the one file in a part of the store: its time stamp, its size); zeros while there is
    none."""
    for path in (folder / "store" / part).glob("*.safetensors"):
        try:
            return path.stat().st_mtime_ns, path.stat().st_size
        except OSError:
            continue
    return 0, 0


def tensors_of(path):
    _, _, start = read_header(path)
    return path.read_bytes()[start:]


def test_a_fresh_process_goes_on_where_five_before_it_were_killed(tmp_path, count):
    whole = tmp_path / "whole"
    process = started(whole, whole / "out.safetensors")
    assert "resumed" not in process.communicate(timeout=600)[0] and process.returncode == 0

    folder, chosen = tmp_path / "killed", random.Random(1)
    for part in ("anchors", "anchors", "states", "states", "states"):
        before, process = stored(folder, part), started(folder, folder / "out.safetensors")
        deadline = time.monotonic() + 600
        while stored(folder, part) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.03 * chosen.random())
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()}"
        process.kill()
        process.communicate()
        assert not (folder / "out.safetensors").exists()
        for path in (folder / "store").rglob("*.safetensors"):
            read_sealed(path)
        count("kill")
        count("kill of a fresh process")

    # one of them has to wait for the other
    both = [started(folder, folder / f"out-{number}.safetensors") for number in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert (
        sum("resumed at iteration" in text for text in said)
        == sum("kept from an earlier run" in text for text in said)
        == 1
    ), said
    expected = tensors_of(whole / "out.safetensors")
    assert all(tensors_of(folder / f"out-{number}.safetensors") == expected for number in range(2))
    assert not list(folder.rglob("*.cul-part")) and not list((folder / "store/states").iterdir())
