"""A sweep on two nodes of a Ray cluster loses nothing when its workers are killed (needs the package ray)."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cul_core.cli import main

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds Ray's workers in /proc"),
]
KILLS = 10
NAMES = "Lava", "Denim", "Pop Dots", "Candy Stripes"


@pytest.fixture
def two_nodes():
    """Address of a cluster on this machine with two nodes of one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def workers():
    """Process ids of the workers that run a command."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cmdline").read_bytes().startswith(b"ray::run_here"):
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


class Killer(threading.Thread):
    """Kills a random worker every few seconds, KILLS times."""

    def __init__(self, marks):
        super().__init__(daemon=True)
        self.marks, self.killed, self.is_over = marks, 0, False

    def run(self):
        rng = random.Random(7)
        while self.killed < KILLS and not self.is_over:
            time.sleep(rng.uniform(2, 8))
            # not before anything is computed: only then is there something to lose
            if (running := workers()) and any(self.marks.rglob("log.txt")):
                os.kill(rng.choice(running), signal.SIGKILL)
                self.killed += 1


def swept(folder, plan, *options):
    assert main(["sweep", str(plan), "--out", str(folder), *options]) == 0
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {line["command"]: (line["losses"], load_file(line["checkpoint"])) for line in lines}


def test_ten_kills_of_workers_cost_no_command_and_change_no_result(two_nodes, tmp_path):
    plan = tmp_path / "plan.txt"
    options = "--preset esd --iterations 16"
    plan.write_text("\n".join(f"unlearn '{name}' {options}" for name in NAMES))
    undisturbed = swept(tmp_path / "undisturbed", plan, "--workers", "1")
    killer = Killer(tmp_path / "disturbed")
    killer.start()
    disturbed = swept(tmp_path / "disturbed", plan, "--engine", "ray", "--address", two_nodes)
    killer.is_over = True
    killer.join()
    assert killer.killed == KILLS and disturbed.keys() == undisturbed.keys()
    for command, (losses, weights) in undisturbed.items():
        assert disturbed[command][0] == losses
        assert all(torch.equal(tensor, disturbed[command][1][name]) for name, tensor in weights.items())
