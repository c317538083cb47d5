"""Worker processes end with the process that started them."""

import os
import signal
import subprocess
import sys
import time

import pytest

_PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from cul_core.minicanvas.workers import prepare_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=prepare_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signal")
def test_a_worker_does_not_outlive_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        for _ in range(200):
            if not _alive(worker):
                return
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on without its parent")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") if os.path.exists(f"/proc/{pid}/stat") else open(os.devnull) as file:
        return " Z " not in file.read()  # a zombie that nobody has collected yet is gone
