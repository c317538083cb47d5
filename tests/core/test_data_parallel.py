"""A step on two processes is the step of one: the same loss at the same batch, to rounding."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cul_core.training.data_parallel import Processes, joined_processes

HERE = Path(__file__).parent
STEPS = ("plain:3", "plain:1", "penalty:4", "distillation:4")
"""Parts and batch size of each step; two processes share 3 rows unequally, and 1 row not at all."""


def started(count, source, out):
    """The processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent / "nodes")))
    common = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": paths}
    out.mkdir()
    command = [sys.executable, str(HERE / "two_processes.py"), str(source), str(out), *STEPS]
    return [
        subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in (common | {"RANK": rank}).items()})
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def results(random_checkpoint, tmp_path_factory):
    """Number of processes -> step -> its losses and edits."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for count in (1, 2):
        running = started(count, random_checkpoint, folder / str(count))
        try:
            assert [process.wait(500) for process in running] == [0] * count
        finally:
            for process in running:
                process.kill()
        found[count] = {step: load_file(folder / str(count) / f"{step}.safetensors") for step in STEPS}
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
@pytest.mark.parametrize("step", STEPS)
def test_two_processes_have_the_losses_and_the_edits_of_one(step, results):
    one, two = results[1][step], results[2][step]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    assert two.keys() == one.keys() and len(one) > 1
    for name in one.keys() - {"losses"}:
        # Adam divides by the root of the second moment, so rounding shows where a gradient is almost zero
        assert (two[name] - one[name]).norm() <= 1e-2 * one[name].norm()


def test_one_process_alone_is_what_a_step_has_by_default(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone, tensor = joined_processes(), torch.ones(2)
    assert type(alone) is Processes and alone.part(5) == slice(0, 5)
    alone.add_up(tensor)
    assert alone.gathered(tensor, 2) is tensor and tensor.tolist() == [1, 1] and alone.told(lambda: 3) == 3


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8])
def test_every_row_is_of_one_process(rows):
    processes = [Processes() for _ in range(3)]
    for rank, each in enumerate(processes):
        each.rank, each.count = rank, 3
    assert [row for each in processes for row in range(rows)[each.part(rows)]] == list(range(rows))
