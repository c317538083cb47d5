"""A program that is killed at any moment loses nothing: the next run goes on to the same bits, and files are whole or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
KILLS = 100

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def crash(folder, *arguments):
    done = subprocess.run([sys.executable, str(HERE / "crash.py"), str(folder), *map(str, arguments)], env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=3000)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["problems"] == [], done.stderr[-4000:]
    return result


def test_a_chain_that_is_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path, count):
    died = crash(tmp_path, 1, "kill", KILLS)["died"]
    assert sum(died.values()) >= KILLS
    phases = ("anchors", "preparation", "updates", "writing a state", "writing a result", "evicting", "writing the checkpoint")
    assert all(died.get(phase) for phase in phases), died
    for phase, number in died.items():
        count(f"kill while {phase}", number)
    count("kill", sum(died.values()))
