"""Speed of several processes: a step on one and on two of them, and a sweep on a Ray cluster of two nodes.

    python benchmarks/machines.py [--cells plain esd ...] [--images 1] [--out machines.json]

The step trains MiniCanvas; its rate is that between two runs of different length, in turn, so that starting
and anchor images do not count. The sweep runs one benchmark for each cell, once on one process and once on
the cluster, and compares what both have measured. The second part needs the package ray.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT, LONG = 40, 240
"""Iterations of the two runs."""
CELLS = ("plain", "plain_ours", "l1sp_ours", "l2sp_ours", "esd", "uce", "exact", "null_space")
TIMES = ("seconds", "started", "machine")


def run(*words: str) -> float:
    """Seconds of a Python process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def step_seconds(folder: Path, processes: int, iterations: int) -> float:
    name = f"{processes}-{iterations}"
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    options = ["--preset", "plain_ours", "--iterations", str(iterations), "--store", str(folder / name)]
    files = ["--out", str(folder / f"{name}.safetensors")]
    return run(*launcher, "-m", "cul_core", "unlearn", "Lava", *options, *files)


def rates(folder: Path) -> dict[str, float]:
    """Iterations a second of one step, by the number of processes."""
    seconds = {(n, count): step_seconds(folder, n, count) for count in (SHORT, LONG) for n in (1, 2)}
    return {str(n): (LONG - SHORT) / (seconds[n, LONG] - seconds[n, SHORT]) for n in (1, 2)}


def measured(folder: Path) -> list[dict]:
    """Lines of a sweep's benchmarks, without what tells of time and machine."""
    lines = map(json.loads, (folder / "benchmark.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def sweeps(folder: Path, cells: list[str], images: int) -> dict[str, object]:
    """Seconds of the same sweep on one process and on two nodes, and whether both measured the same."""
    from ray.cluster_utils import Cluster

    plan = folder / "plan.txt"
    plan.write_text(f"benchmark --cells {' '.join(cells)} --seeds 100 --requests 1 --pictures {images}")
    words = ["-m", "cul_core", "sweep", str(plan), "--out"]
    alone = run(*words, str(folder / "one"), "--workers", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        together = run(*words, str(folder / "two"), "--engine", "ray", "--address", cluster.address)
    finally:
        cluster.shutdown()
    is_same = measured(folder / "one") == measured(folder / "two")
    return {
        "commands": len(cells),
        "one process, s": alone,
        "two nodes, s": together,
        "same results": is_same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--images", type=int, default=1, help="of each style and object")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"iterations a second by processes": rates(Path(folder))}
        found["sweep"] = sweeps(Path(folder), arguments.cells, arguments.images)
    text = json.dumps(found, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
