"""Our step against the published code (CUIG, arXiv 2511.07970): Concept Ablation on SD 1.5, random weights.

    python benchmarks/vs_reference.py --reference PATH --tokenizer PATH [--python PYTHON] [--json PATH]

PATH of `--reference` is a clone of https://github.com/justinhylee135/CUIG. Its `train_conabl.py` runs
unchanged in an interpreter with its requirements (`env.yaml`: diffusers 0.30.2, transformers 4.44.2,
accelerate 0.34.2, torchvision, regex). Both sides have the same weights (fp16 files, fp32 in memory),
prompts, batch size, resolution, iterations, number of anchor images and threads, on the CPU. Every run is a
process of its own. The sides take turns, and medians are reported. The model files are read once before a run
begins.

Below the table the meaning of each figure is printed, with the replacements on either side and the defaults
of the published code that were kept. `cpu s` are seconds of processor time; other programs on the machine
disturb them less than wall-clock seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from random_model import write_checkpoint, write_folder

import cul_core
from cul_core.base.errors import CulError
from cul_core.files.atomic_write import write_atomically

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_HERE = Path(__file__).resolve().parent
SIDES = ("reference", "ours")
KINDS = ("request", "own", "selft", "projection")
OWN_STEPS = {"reference": 20, "ours": 5}
"""A fifth of each side's own sampling steps per anchor image: 100 of DDIM, 25 of DPM-Solver++."""
_ENTRY = Path("UnlearningMethods", "ConAbl", "train_conabl.py")
_ANCHOR, _TARGET = "horse", "dog"
_PROMPTS = (
    "a horse in a field",
    "a photo of a horse by a lake",
    "a horse under an old tree",
    "a drawing of a horse at night",
)
_KEEP = (
    "cat",
    "cow",
    "sheep",
    "pig",
    "rabbit",
    "bird",
    "fish",
    "frog",
    "bear",
    "lion",
    "tiger",
    "elephant",
    "car",
    "bus",
    "train",
    "boat",
    "bicycle",
    "house",
    "tower",
    "bridge",
    "church",
    "chair",
    "table",
    "lamp",
    "clock",
    "cup",
    "bottle",
    "book",
    "guitar",
    "piano",
    "flower",
    "tree",
    "mountain",
    "river",
    "cloud",
    "castle",
    "statue",
    "sandwich",
    "apple",
    "hat",
)
_SAMPLE_SECONDS = 0.02
KEPT_DEFAULTS = (
    "AdamW of PyTorch (not 8-bit) with weight decay 0.01, on both sides",
    "the text encoder runs for both prompts in every iteration",
    "the autoencoder encodes the anchor image in every iteration",
    "attention of custom diffusion, which holds the whole attention matrix; no xformers",
    "no gradient checkpointing, no mixed precision",
    "two worker processes load data; their memory is not counted",
    "SelFT draws each of its states from new noise",
)
NOT_DEFAULT = (
    "--noaug, as in its own scripts; no --hflip, which would need the autoencoder on our side",
    "--prior_generation_precision fp32 instead of fp16, as we sample",
    "no safety checker in the model's folder; the published code would load it before saving",
)


class BenchmarkError(Exception):
    """An error that the user can mend, in one sentence; the exit status is 1."""


@dataclass(frozen=True)
class Row:
    """One row of the table: medians of both sides, None if missing, and the meaning of the figure."""

    name: str
    reference: float | None
    ours: float | None
    meaning: str = ""

    @property
    def ratio(self) -> float | None:
        """reference / ours; None if either is missing."""
        return self.reference / self.ours if self.reference is not None and self.ours else None


def table(rows: Sequence[Row]) -> str:
    """An aligned table, one line per row."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}{'reference':>12}{'ours':>12}{'ratio':>9}"]
    for row in rows:
        cells = ["-" if value is None else f"{value:.4g}" for value in (row.reference, row.ours)]
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"{row.name:{width}}{cells[0]:>12}{cells[1]:>12}{ratio:>9}")
    return "\n".join(lines)


def selft_calls(steps: int) -> dict[str, tuple[int, int]]:
    """Side -> (calls of the UNet, images in them) of SelFT's scoring of one object at `steps` states.

    The numbers follow from the code of each side.
    """
    again = steps * (steps - 1) // 2  # guided calls (two images) from new noise to each state
    return {"reference": (again + 3 * steps, 2 * again + 3 * steps), "ours": (2 * steps, 3 * steps)}


def _spent(run: dict, name: str, value: str = "wall") -> float | None:
    spans = run["spans"].get(name)
    return (
        sum(span["end"] - span["begin"] if value == "wall" else span[value] for span in spans)
        if spans
        else None
    )


def _of_request(run: dict) -> dict[str, float | None]:
    """The figures of one run of a whole request, in seconds and GiB."""
    updates, anchors = run["updates"], _spent(run, "anchors")
    between = [
        [later[i] - earlier[i] for earlier, later in zip(updates, updates[1:], strict=False)] for i in (0, 1)
    ]
    written = run["spans"]["run"][0]["end"]
    return {
        "iteration": median(between[0]) if between[0] else None,
        "iteration_cpu": median(between[1]) if between[1] else None,
        "anchors": anchors,
        "anchors_cpu": _spent(run, "anchors", "cpu"),
        "first": updates[0][0] - run["begin"] - anchors,
        "whole": written - run["begin"],
        "whole_cpu": run["cpu"],
        "peak": _gib(run["peak_bytes"]),
        "anonymous": _gib(run["peak_anonymous_bytes"]),
        "training": _gib(run["peak_training_bytes"]),
    }


def _gib(count: int | None) -> float | None:
    return None if count is None else count / 2**30


def rows_of(runs: Sequence[dict], job: dict[str, Any]) -> list[Row]:
    """The rows of the table, from the records of all runs."""
    by = {
        (side, kind): [run for run in runs if (run["side"], run["kind"]) == (side, kind)]
        for side in SIDES
        for kind in KINDS
    }

    def row(name: str, kind: str, figure, meaning: str = "") -> Row:
        values = []
        for side in SIDES:
            measured = [value for run in by[side, kind] if (value := figure(run)) is not None]
            values.append(median(measured) if measured else None)
        return Row(name, *values, meaning)

    def of_request(name: str, key: str, meaning: str = "") -> Row:
        return row(name, "request", lambda run: _of_request(run)[key], meaning)

    rows = []
    if by["ours", "request"]:
        rows += [
            of_request(
                "iteration, s",
                "iteration",
                "from the end of one update to the end of the next, the median within a run",
            ),
            of_request("iteration, cpu s", "iteration_cpu"),
            of_request(
                "to the first update, s",
                "first",
                "from the start of the process, less the time of the anchor images",
            ),
            of_request(
                "anchor images, s",
                "anchors",
                f"{job['anchors']} images, {job['anchor_steps']} guided steps each; the reference also loads "
                "a pipeline, decodes and writes JPEG",
            ),
            of_request("anchor images, cpu s", "anchors_cpu"),
            of_request(
                "whole request, s",
                "whole",
                "from the start of the process until the edited weights are on the disk",
            ),
            of_request("whole request, cpu s", "whole_cpu", "of the whole process and its workers"),
            of_request(
                "peak memory, GiB",
                "peak",
                "the most the process had in memory (VmHWM), with pages of mapped files",
            ),
            of_request(
                "of it anonymous, GiB",
                "anonymous",
                "peak without pages of mapped files, sampled every 20 ms",
            ),
            of_request(
                "training's peak, GiB",
                "training",
                "peak between the anchor images and the last update, sampled every 20 ms",
            ),
        ]
    if by["ours", "own"]:
        rows += [
            row(
                "own sampling: whole request, s",
                "own",
                lambda run: _of_request(run)["whole"],
                f"a fifth of each side's own sampling steps, 100 and 25; {job['anchors']} images have about "
                "the share of time that 200 have in 1000 iterations; one run",
            ),
            row("own sampling: whole request, cpu s", "own", lambda run: _of_request(run)["whole_cpu"]),
        ]
    if by["ours", "selft"]:
        at, formula = f"SelFT at {job['selft_steps']} states of {job['selft_resolution']} px", selft_calls(50)
        rows += [
            row(
                f"{at}, s",
                "selft",
                lambda run: _spent(run, "selft"),
                "scores of all weights for one target, and the mask; one run",
            ),
            row(f"{at}, cpu s", "selft", lambda run: _spent(run, "selft", "cpu")),
            row(
                "  calls of the UNet",
                "selft",
                lambda run: _spent(run, "selft", "calls"),
                "counted; a guided call has two images",
            ),
            row("  pictures in them", "selft", lambda run: _spent(run, "selft", "pictures")),
        ]
        if job["selft_steps"] != 50:
            rows.append(
                Row(
                    "  calls at 50 states",
                    formula["reference"][0],
                    formula["ours"][0],
                    "not counted: T(T - 1)/2 + 3T, and 2T",
                )
            )
    if by["ours", "projection"]:
        rows += [
            row(
                "projection: prepare, s",
                "projection",
                lambda run: _spent(run, "project_prepare"),
                f"encoding {len(job['keep'])} retained names and making the projector; one run",
            ),
            row(
                "projection: prepare, cpu s", "projection", lambda run: _spent(run, "project_prepare", "cpu")
            ),
            row(
                "projection: update, ms",
                "projection",
                lambda run: 1000 * _spent(run, "project_update") / len(run["updates"]),
                "projecting gradients (reference) or changes (ours) of 32 matrices, mean of the updates",
            ),
            row(
                "projection: update, cpu ms",
                "projection",
                lambda run: 1000 * _spent(run, "project_update", "cpu") / len(run["updates"]),
            ),
        ]
    return rows


def _watched(command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Times of a process that is run to its end, and samples of its memory (Linux).

    Raises:
        BenchmarkError: the process failed.
    """
    samples, load = [], os.getloadavg() if hasattr(os, "getloadavg") else None
    before = os.times()
    with log.open("wb") as output:
        begin = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while process.poll() is None:
                if (memory := _memory(process.pid)) is not None:
                    samples.append((time.monotonic(), *memory))
                time.sleep(_SAMPLE_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    after = os.times()
    if process.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise BenchmarkError(
            f"{Path(command[1]).name} ended with {process.returncode} "
            f"({last[0][:200] if last else 'no output'}); see {log}, which --work keeps."
        )
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"begin": begin, "end": time.monotonic(), "cpu": cpu, "samples": samples, "load": load}


def _read(path: Path) -> None:
    """Read a file into the page cache."""
    with path.open("rb") as file:
        while file.read(8 << 20):
            pass


def _memory(pid: int) -> tuple[int, int] | None:
    """(resident, anonymous) bytes of a process; None where the system does not report them."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {
        line.partition(":")[0]: int(line.split()[1]) * 1024
        for line in lines
        if line.startswith(("VmRSS:", "RssAnon:"))
    }
    return (sizes["VmRSS"], sizes["RssAnon"]) if len(sizes) == 2 else None


def _run(
    side: str, kind: str, job: dict[str, Any], python: str, folder: Path, threads: int
) -> dict[str, Any]:
    """The record of one process of one side: its own marks, its times and its memory."""
    out = Path(tempfile.mkdtemp(prefix=f"{kind}-{side}-", dir=folder))
    minimal = {"anchors": 1, "anchor_steps": 1, "anchor_prompts": job["anchor_prompts"][:1]}
    job = (
        job
        | {"kind": kind, "out": str(out), "marks": str(out / "marks.json")}
        | {
            "request": {},
            "own": {"anchor_steps": OWN_STEPS[side]},
            "projection": minimal | {"iterations": 3, "resolution": 64},
            "selft": minimal | {"iterations": 0, "resolution": job["selft_resolution"]},
        }[kind]
    )
    (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if side == "ours":
        # the package of this checkout
        environment["PYTHONPATH"] = str(Path(cul_core.__file__).resolve().parents[1])
    script = _HERE / "comparison" / ("our_side.py" if side == "ours" else "reference_side.py")
    model = Path(job["checkpoint" if side == "ours" else "model_folder"])
    for path in [model] if model.is_file() else model.rglob("*.safetensors"):
        _read(path)
    watched = _watched([python, str(script), str(out / "job.json")], environment, folder / f"{out.name}.log")
    marks = json.loads((out / "marks.json").read_text(encoding="utf-8"))
    samples = watched.pop("samples")
    anchored = marks["spans"]["anchors"][0]["end"]
    training = [
        rss for at, rss, _ in samples if marks["updates"] and anchored <= at <= marks["updates"][-1][0]
    ]
    shutil.rmtree(out)
    return {
        "side": side,
        "kind": kind,
        **watched,
        **marks,
        "peak_anonymous_bytes": max((anonymous for *_, anonymous in samples), default=None),
        "peak_training_bytes": max(training, default=None),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="clone of https://github.com/justinhylee135/CUIG"
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter with the reference's requirements; this one if not given",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with CLIP's vocab.json and merges.txt"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of runs; all if not given"
    )
    parser.add_argument(
        "--resolution", type=int, default=256, help="side of the images in pixels, a multiple of 64"
    )
    parser.add_argument("--batch", type=int, default=1, help="anchor images per iteration")
    parser.add_argument(
        "--iterations",
        type=int,
        default=5,
        help="updates of a request; the first is not timed",
    )
    parser.add_argument("--anchors", type=int, default=4, help="number of anchor images")
    parser.add_argument("--anchor-steps", type=int, default=4, help="sampling steps of an anchor image")
    parser.add_argument(
        "--selft-steps",
        type=int,
        default=20,
        help="states of SelFT's scoring; 50 are published and take 20 minutes",
    )
    parser.add_argument(
        "--selft-resolution",
        type=int,
        default=64,
        help="side of the images in SelFT's scoring, in pixels",
    )
    parser.add_argument("--repeats", type=int, default=2, help="runs of a whole request on each side")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="threads of each process; one per core if not given",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the model (4.3 GB) and logs, kept for later runs; a temporary one if not given",
    )
    parser.add_argument("--json", type=Path, help="JSON file for all figures, settings and runs")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.reference / _ENTRY).is_file():
        raise BenchmarkError(
            f"{str(arguments.reference)!r} has no {_ENTRY}; clone https://github.com/justinhylee135/CUIG and "
            "give that folder as --reference."
        )
    for name in ("vocab.json", "merges.txt"):
        if not (arguments.tokenizer / name).is_file():
            raise BenchmarkError(
                f"The tokenizer folder {str(arguments.tokenizer)!r} has no {name}; give a folder that holds "
                "CLIP's vocab.json and merges.txt."
            )
    if shutil.which(arguments.python) is None:
        raise BenchmarkError(
            f"There is no interpreter {arguments.python!r}; give one with the reference's requirements as "
            "--python."
        )
    for name in ("resolution", "selft_resolution"):
        value = getattr(arguments, name)
        if value < 64 or value % 64:
            raise BenchmarkError(f"--{name.replace('_', '-')} is {value}; give a multiple of 64.")
    least = {
        "batch": 1,
        "iterations": 2,
        "anchors": 1,
        "anchor_steps": 1,
        "selft_steps": 1,
        "repeats": 1,
        "threads": 1,
    }
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise BenchmarkError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least {value}."
            )


def _measure(arguments: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[dict]]:
    checkpoint, folder = work / "random-sd15.safetensors", work / "random-sd15"
    if not checkpoint.is_file():
        write_checkpoint(checkpoint)
    if not folder.is_dir():
        write_folder(checkpoint, arguments.tokenizer, folder)
    job = {
        "reference": str(arguments.reference.resolve()),
        "model_folder": str(folder),
        "checkpoint": str(checkpoint),
        "tokenizer": str(arguments.tokenizer.resolve()),
        "anchor": _ANCHOR,
        "target": _TARGET,
        "keep": _KEEP,
        "anchor_prompts": _PROMPTS[: arguments.anchors],
        "anchors": arguments.anchors,
        "anchor_steps": arguments.anchor_steps,
        "iterations": arguments.iterations,
        "batch_size": arguments.batch,
        "resolution": arguments.resolution,
        "learning_rate": 2e-6,
        "seed": 1,
        "kept_fraction": 0.05,
        "selft_steps": arguments.selft_steps,
        "selft_resolution": arguments.selft_resolution,
    }
    runs = []
    for kind in (kind for kind in KINDS if kind in arguments.kinds):
        for repeat in range(arguments.repeats if kind == "request" else 1):
            for side in SIDES[:: -1 if repeat % 2 else 1]:
                runs.append(
                    _run(
                        side,
                        kind,
                        job,
                        arguments.python if side == "reference" else sys.executable,
                        work,
                        arguments.threads,
                    )
                )
                sys.stderr.write(f"{kind}, {side}: {runs[-1]['end'] - runs[-1]['begin']:.0f} s\n")
    return job, runs


def _replaced(runs: Sequence[dict]) -> list[str]:
    """The replacements in these runs, with the kinds of runs they concern if not all."""
    kinds: dict[str, dict[str, None]] = {}
    for run in runs:
        for shim in run["shims"]:
            kinds.setdefault(shim, {})[run["kind"]] = None
    every = len({run["kind"] for run in runs})
    return [shim if len(own) == every else f"{shim} ({', '.join(own)})" for shim, own in kinds.items()]


def report(job: dict[str, Any], runs: list[dict]) -> tuple[str, dict[str, Any]]:
    """(text to print, values to write as JSON) of all runs."""
    rows = rows_of(runs, job)
    shims = {side: _replaced([run for run in runs if run["side"] == side]) for side in SIDES}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": runs[0]["threads"],
        "torch": {run["side"]: run["torch"] for run in runs},
        "load": [run["load"] for run in runs],
    }
    loads = [run["load"][0] for run in runs if run["load"]]
    load = f", load {min(loads):.1f} to {max(loads):.1f} as runs began" if loads else ""
    head = (
        f"Stable Diffusion 1.5, random weights, fp32 on the CPU: {job['resolution']} px, batch "
        f"{job['batch_size']}, {job['iterations']} iterations, {machine['threads']} threads{load}; ratio: "
        "reference / ours"
    )
    lists = {
        "meaning": [f"{row.name.strip()}: {row.meaning}" for row in rows if row.meaning],
        "kept of the reference": KEPT_DEFAULTS,
        "set for the reference": NOT_DEFAULT,
        **{f"replaced on the side of {side}": shims[side] for side in SIDES},
    }
    below = [
        f"\n{name}:\n" + "\n".join(f"- {line}" for line in lines) for name, lines in lists.items() if lines
    ]
    text = "\n".join([head, "", table(rows), *below])
    values = {
        "job": job,
        "machine": machine,
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "shims": shims,
        "kept": KEPT_DEFAULTS,
        "set": NOT_DEFAULT,
        "selft_calls_at_50_states": selft_calls(50),
        "runs": runs,
    }
    return text, values


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a user error with one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
        if arguments.work is None:
            with tempfile.TemporaryDirectory(prefix="vs-reference-") as work:
                job, runs = _measure(arguments, Path(work))
        else:
            arguments.work.mkdir(parents=True, exist_ok=True)
            job, runs = _measure(arguments, arguments.work.resolve())
        text, values = report(job, runs)
        sys.stdout.write(text + "\n")
        if arguments.json is not None:
            write_atomically(arguments.json, lambda file: file.write(json.dumps(values, indent=1).encode()))
    except (BenchmarkError, CulError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
