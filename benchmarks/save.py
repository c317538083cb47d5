"""Time and memory of writing an edited checkpoint: our streaming save, `cp`, and load and save of all.

    python benchmarks/save.py [--size-gb 6.94] [--rounds 5] [--folder DIR] [--out save.json]

The source has the names, shapes and precision of Stable Diffusion XL and random values; smaller sizes leave
out tensors outside the UNet. Every way writes into the same folder, in a process of its own, after a `cp`
that is not measured. All ways but `cp_unflushed` flush to the disk. A source is hashed once a process, when
it is opened; `ours_hashing` hashes it again during the save.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/core")]
WAYS = {
    "cp": "cp, flushed to the disk",
    "cp_unflushed": "cp, not flushed",
    "ours": "our streaming save",
    "ours_hashing": "our streaming save, hashing its source anew",
    "load_all": "load everything, save everything, flushed",
}


def make_source(path: Path, size_gb: float) -> None:
    """Write random fp16 values in SDXL's layout, from one block of 64 MiB at changing offsets."""
    from sd_layout import UNET, _header, xl_shapes

    shapes = xl_shapes()
    # text encoders and autoencoder go first
    for name in [name for name in sorted(shapes) if not name.startswith(UNET)]:
        if sum(torch.Size(shape).numel() * 2 for shape in shapes.values()) > size_gb * 1e9:
            del shapes[name]
    head, size = _header(shapes)
    block = (
        (torch.randint(0, 1 << 16, (32 << 20,), dtype=torch.int32).to(torch.int16) & ~0x4000)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
    with path.open("wb") as file:
        file.write(head)
        while size > 0:
            start = 2 * (size % 99_991)
            size -= file.write(block[start : start + size])
        file.flush()
        os.fsync(file.fileno())


def model_of(source: Path):
    """The source with an edit of every key and value matrix of its cross-attentions."""
    from cul_core.files.safetensors_format import read_header
    from cul_core.models.weight_roles import keys_with_role
    from cul_core.output.checkpoint import open_model

    header, _, _ = read_header(source)
    model = open_model(source)
    keys = keys_with_role(model.family, "text_readers", header)
    edits = {key: torch.full(header[key]["shape"], 1e-3) for key in keys}
    return type(model)(model.source, model.family, edits)


def peak_bytes() -> int:
    """Peak resident bytes of this process since `reset_peak`, with pages of mapped files (Linux only)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])


def reset_peak() -> int:
    """Resident bytes now, from which the peak is measured anew (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_all(source: Path, target: Path, edits: dict) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    for key, delta in edits.items():
        tensors[key] = (tensors[key].float() + delta).half()
    save_file(tensors, target)
    flush(target)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", source, target], check=True) if shutil.which("cp") else shutil.copyfile(
        source, target
    )


def way_to_write(way: str, source: Path, target: Path) -> Callable[[], None]:
    if way == "cp_unflushed":
        return partial(copy, source, target)
    if way == "cp":
        return lambda: (copy(source, target), flush(target))
    from cul_core.models import source as sources
    from cul_core.output.checkpoint import save_checkpoint

    model = model_of(source)
    if way == "load_all":
        return partial(load_all, source, target, dict(model.edits))
    if way == "ours_hashing":
        sources._sha256.cache_clear()
    return partial(save_checkpoint, model, target)


def measure(way: str, source: Path, target: Path) -> dict:
    """Seconds and extra memory of one way in this process.

    A copy right before it brings the page cache into the same state for every way.
    """
    write = way_to_write(way, source, target)
    copy(source, target)
    target.unlink()
    os.sync()
    before, begun = reset_peak(), time.perf_counter()
    write()
    return {"way": way, "seconds": time.perf_counter() - begun, "extra_bytes": peak_bytes() - before}


def run(source: Path, rounds: int) -> list[dict]:
    lines, target = [], source.with_name("written.safetensors")
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", way, str(source), str(target)]
            lines.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
            target.unlink()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=6.94)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder on the disk to measure; the system's temporary folder if not given",
    )
    parser.add_argument("--out", type=Path, default=Path("save.json"))
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, source, target = arguments.measure
        sys.stdout.write(json.dumps(measure(way, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "source.safetensors"
        make_source(source, arguments.size_gb)
        size, lines = source.stat().st_size, run(source, arguments.rounds)
    figures = {}
    for way in WAYS:
        seconds = [line["seconds"] for line in lines if line["way"] == way]
        extra = max(line["extra_bytes"] for line in lines if line["way"] == way)
        figures[way] = {"seconds": statistics.median(seconds), "all_seconds": seconds, "extra_bytes": extra}
    for values in figures.values():
        values["times_cp"] = values["seconds"] / figures["cp"]["seconds"]
    arguments.out.write_text(json.dumps({"bytes": size, "ways": figures}, indent=1) + "\n")
    sys.stdout.write(f"{size / 1e9:.2f} GB, median of {arguments.rounds}\n")
    for way, text in WAYS.items():
        values = figures[way]
        sys.stdout.write(
            f"{text:<45} {values['seconds']:7.2f} s  {values['times_cp']:5.2f} x cp  "
            f"{values['extra_bytes'] / 1e6:7.0f} MB extra at most\n"
        )


if __name__ == "__main__":
    main()
