"""Full-size models of random weights, without a download. Slow: run them with -m slow."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import CUL, Graph
from hosts import HOW, NEWEST, PACK, Host
from safetensors import safe_open
from safetensors.torch import load_file
from sd_layout import checkpoint_shapes, write_random

from cul_core.history.step_record import read_history

pytestmark = pytest.mark.slow


@pytest.fixture
def newest(tmp_path):
    """A server of the newest host, alone on the machine; what it wrote goes at the end."""
    if NEWEST is None:
        pytest.skip(HOW)
    running = Host(NEWEST, tmp_path, {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    yield running
    running.stop()
    for path in tmp_path.rglob("*.safetensors"):
        if not path.is_symlink() and PACK not in path.resolve().parents:
            path.unlink()


def test_sd15_goes_from_its_file_through_a_step_into_a_file_that_stock_nodes_draw_with(newest, capsys):
    """12 GB of memory and 5 GB on the disk. Everything as usual, but for how long it trains: three iterations
    on one anchor image."""
    source = write_random(newest.folder / "models/checkpoints/sd15.safetensors", checkpoint_shapes())
    graph = Graph()
    training = graph.training(iterations=3, batch_size=1, learning_rate=1e-5, anchor_count=1, anchor_steps=1)
    step = graph.step(graph.load(source.name), "Van Gogh", training=training, preset="plain")
    graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix="checkpoints/forgot")
    begun = newest.run(graph, 3000)["status"]["messages"]
    (saved,) = newest.saved("checkpoints/forgot_*")
    newest.forget()
    stock = Graph()
    loaded = stock.add("CheckpointLoaderSimple", ckpt_name=saved.name)
    prompts = [
        (stock.add("CLIPTextEncode", clip=(loaded, 1), text=text), 0)
        for text in ("a painting by Van Gogh", "")
    ]
    empty = stock.add("EmptyLatentImage", width=256, height=256, batch_size=1)
    latent = stock.add(
        "KSampler",
        model=(loaded, 0),
        positive=prompts[0],
        negative=prompts[1],
        latent_image=(empty, 0),
        seed=5,
        steps=2,
        cfg=4.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=1.0,
    )
    stock.add("SaveLatent", samples=(latent, 0), filename_prefix="sampled")
    newest.run(stock, 1200)
    sampled = load_file(newest.saved("sampled_*.latent")[0])["latent_tensor"]
    assert sampled.shape == (1, 4, 32, 32) and sampled.isfinite().all() and sampled.std() > 0.1

    with safe_open(source, "pt") as before, safe_open(saved, "pt") as after:
        assert list(before.keys()) == list(after.keys())
        changed = {
            name for name in before.keys() if not torch.equal(before.get_tensor(name), after.get_tensor(name))
        }
    assert len(changed) == 32 and all(re.search(r"attn2\.to_[kv]\.weight$", name) for name in changed)
    assert [record.targets for record in read_history(saved)[0]] == [("Van Gogh",)]
    seconds = (begun[-1][1]["timestamp"] - begun[0][1]["timestamp"]) / 1000
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{newest.process.pid}/status").read_text())[1]
    with capsys.disabled():
        sys.stdout.write(
            f"\nSD 1.5 in the host: {seconds:.0f} s to train and save, peak {int(peak) / 1e6:.1f} GB "
            "resident\n"
        )


def test_sdxl_is_written_by_streaming_with_little_memory(tmp_path, capsys):
    """20 GB on the disk.

    Of SDXL only the key map and the writing are tested at full size. To train it on a CPU takes more than 24
    GB of memory: the UNet has 2.57 G weights and the text encoders 0.82 G, 13.6 GB in the trainer's fp32,
    beside the host's own 10.3 GB UNet and 1.6 GB of text encoders. Its layout is trained, saved and compared
    with the host's own code at a smaller width (`larger_in_host.py`).
    """
    command = [
        sys.executable,
        PACK / "benchmarks/save.py",
        "--rounds",
        "1",
        "--folder",
        tmp_path,
        "--out",
        tmp_path / "f.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["bytes"] > 6.9e9
    assert all(figures["ways"][way]["extra_bytes"] < 200e6 for way in ("ours", "ours_hashing"))
    with capsys.disabled():
        sys.stdout.write("\n" + done.stdout)
