"""Training speed of a step on this machine's GPU, its share of the GPU's matrix rate, and its peak memory.

    python benchmarks/gpu.py --tokenizer PATH [--family sd1 sdxl] [--batch 1 4 8] [--dtype bfloat16]
                             [--checkpointing off on] [--compile off on] [--json PATH]

Every combination is one `run_step` of Concept Ablation on random weights (or those of `--model`) at the
family's resolution. An iteration is a forward and backward pass of a batch, a forward pass without gradients
for the anchor prompt, and the update. TFLOP/s counts the network's operations without recomputation. `share`
is that rate over the rate of a product of large square matrices of the same dtype, measured in the same
process. `peak GiB` is the peak memory of tensors in the timed iterations. `--device cpu --family mini` runs
the same code on a small model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from random_model import write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cul_core.base.errors import CulError, MemoryShortError, TrainingError
from cul_core.concepts.concept import Concept
from cul_core.files.atomic_write import write_atomically
from cul_core.history.step_record import library_versions
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.sampling import SamplerConfig
from cul_core.output.checkpoint import open_model
from cul_core.parts.training_config import TrainingConfig
from cul_core.requests.request import Request
from cul_core.store.anchors import AnchorStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.compute import Compute
from cul_core.training.step import run_step

WARM_UP = 3
"""Iterations before the timed ones: memory is allocated, kernels are chosen, the network is compiled."""
_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}


class BenchmarkError(Exception):
    """An error that the user can mend, in one sentence; the exit status is 1."""


@dataclass(frozen=True)
class Row:
    """One combination: no figures if memory was too short, no peak where the device does not report it."""

    family: str
    batch: int
    dtype: str
    checkpointing: str
    compile: str
    iterations_per_second: float | None = None
    teraflops: float | None = None
    share: float | None = None
    peak_gib: float | None = None
    said: tuple[str, ...] = ()


def table(rows: Sequence[Row]) -> str:
    """An aligned table, one line per row; the messages of the steps stand below it."""
    head = ("family", "batch", "dtype", "checkpointing", "compile", "it/s", "TFLOP/s", "share", "peak GiB")
    lines = [head]
    for row in rows:
        figures = (
            "-" if value is None else form.format(value)
            for value, form in (
                (row.iterations_per_second, "{:.3g}"),
                (row.teraflops, "{:.3g}"),
                (row.share, "{:.1%}"),
                (row.peak_gib, "{:.2f}"),
            )
        )
        lines.append((row.family, str(row.batch), row.dtype, row.checkpointing, row.compile, *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, *dict.fromkeys(f"- {sentence}" for row in rows for sentence in row.said)])


def matrix_rate(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of the product of two large square matrices, the best of several rounds.

    Args:
        device: `cuda` or `cpu`.
        dtype: of the matrices.
        seconds: least time of measuring.
    """
    side = _MATRIX_SIDE[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, None
    while until is None or time.monotonic() < until:
        begun = time.monotonic()
        for _ in range(4):
            left @ right
        _wait(device)
        best = max(best, 4 * 2 * side**3 / (time.monotonic() - begun)) if until is not None else best
        # timed from the second round on: the first one chooses kernels
        until = until or time.monotonic() + seconds
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _request(iterations: int, batch: int) -> Request:
    return Request(
        concepts=(Concept("dog", "object", "cat"),),
        method=ConAblConfig(),
        anchor_prompts=("an image of a cat",),
        anchor_count=1,
        anchor_sampler=SamplerConfig(steps=1),
        training=TrainingConfig(iterations=iterations, batch_size=batch, learning_rate=1e-6),
    )


class _Bench:
    """Steps of one model on one device; its anchor image is sampled once."""

    def __init__(self, model: UnlearnModel, device: str, tokenizer: Path | None):
        self._model, self._device = model, device
        self._networks, self._store = NetworkCache(tokenizer), AnchorStore()

    def step(self, iterations: int, batch: int, compute: Compute, callbacks: Callbacks | None = None) -> None:
        run_step(
            self._model,
            _request(iterations, batch),
            device=self._device,
            callbacks=callbacks,
            store=self._store,
            networks=self._networks,
            compute=compute,
        )

    def flops(self, dtype: str) -> int:
        """Counted operations of one iteration for one image: those of two iterations less those of one."""
        compute, counts = Compute(dtype=dtype, checkpointing="off"), []
        self.step(0, 1, compute)  # samples the anchor image and encodes the prompts
        for iterations in (1, 2):
            with FlopCounterMode(display=False) as counter:
                self.step(iterations, 1, compute)
            counts.append(counter.get_total_flops())
        return counts[1] - counts[0]

    def measure(self, row: Row, iterations: int, flops: int, rate: float) -> Row:
        """The row with its figures, or with the error of a step that failed."""
        ends, said = [], []

        def note(_) -> None:
            _wait(self._device)
            ends.append(time.monotonic())
            if self._device == "cuda" and len(ends) == WARM_UP:
                torch.cuda.reset_peak_memory_stats()

        compute = Compute(dtype=row.dtype, checkpointing=row.checkpointing, compile=row.compile == "on")
        try:
            self.step(
                WARM_UP + iterations, row.batch, compute, Callbacks(on_progress=note, on_message=said.append)
            )
        except (MemoryShortError, TrainingError) as error:
            return replace(row, said=(*said, str(error)))
        per_second = iterations / (ends[-1] - ends[WARM_UP - 1])
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._device == "cuda" else None
        achieved = flops * row.batch * per_second
        return replace(
            row,
            iterations_per_second=per_second,
            teraflops=achieved / 1e12,
            share=achieved / rate,
            peak_gib=peak,
            said=tuple(said),
        )


def _open(family: str, given: Path | None, work: Path) -> UnlearnModel:
    if given is not None or family == "mini":
        return open_model(given or CHECKPOINT_PATH)
    return open_model(write_checkpoint(work / f"{family}.safetensors", family))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--family", nargs="+", choices=("mini", "sd1", "sd2", "sdxl"), default=["sd1", "sdxl"]
    )
    parser.add_argument(
        "--model", type=Path, help="checkpoint of the single family given, instead of random weights"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with CLIP's vocab.json and merges.txt; all families but mini need it",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8], help="anchor images per iteration")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["bfloat16"]
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument(
        "--iterations", type=int, default=10, help=f"timed iterations, after {WARM_UP} of warm-up"
    )
    parser.add_argument("--json", type=Path, help="JSON file for all figures")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            "This needs a CUDA GPU, and PyTorch finds none; give --device cpu --family mini to run the same "
            "code on a small model."
        )
    if arguments.iterations < 1 or min(arguments.batch) < 1:
        raise BenchmarkError(
            f"--iterations {arguments.iterations} and --batch {' '.join(map(str, arguments.batch))} must be "
            "1 or more."
        )
    if arguments.model is not None and len(arguments.family) > 1:
        raise BenchmarkError(
            f"--model {arguments.model.name!r} is of one family; give only that one as --family."
        )


def _measure(arguments: argparse.Namespace, work: Path) -> dict:
    rates = {dtype: matrix_rate(arguments.device, getattr(torch, dtype)) for dtype in arguments.dtype}
    rows, flops = [], {}
    for family in arguments.family:
        bench = _Bench(_open(family, arguments.model, work), arguments.device, arguments.tokenizer)
        flops[family] = bench.flops(arguments.dtype[0])
        for values in itertools.product(
            arguments.dtype, arguments.batch, arguments.checkpointing, arguments.compile
        ):
            dtype, batch, checkpointing, compiled = values
            rows.append(
                bench.measure(
                    Row(family, batch, dtype, checkpointing, compiled),
                    arguments.iterations,
                    flops[family],
                    rates[dtype],
                )
            )
            sys.stderr.write(table(rows[-1:]).splitlines()[1] + "\n")
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    return {
        "device": card,
        "matrix_flops_per_second": rates,
        "flops_per_picture": flops,
        "rows": rows,
        "versions": library_versions(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a user error with one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
        with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as work:
            results = _measure(arguments, Path(work))
        rates = ", ".join(
            f"{rate / 1e12:.3g} TFLOP/s of {dtype} matrices"
            for dtype, rate in results["matrix_flops_per_second"].items()
        )
        sys.stdout.write(f"{results['device']}: {rates}\n\n{table(results['rows'])}\n")
        if arguments.json is not None:
            values = results | {"rows": [asdict(row) for row in results["rows"]]}
            write_atomically(arguments.json, lambda file: file.write(json.dumps(values, indent=1).encode()))
    except (BenchmarkError, CulError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
