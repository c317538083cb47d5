"""A model is the same one in both places, and what the pack does to a host that lacks something."""

import json
import os
import subprocess

import pytest
from graphs import CUL, Graph
from hosts import HOSTS, HOW, IDS, PACK, Host, on_newest, python_of


@pytest.fixture(scope="module", params=HOSTS or [None], ids=IDS)
def checkout(request):
    if request.param is None:
        pytest.skip(HOW)
    return request.param


def result_of(script, checkout, *arguments):
    """What a script beside this file prints when the host's Python runs it."""
    command = [python_of(checkout), str(PACK / "tests/nodes" / script), str(checkout), str(PACK), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def compared(checkout):
    return result_of("in_host.py", checkout)


def test_host_and_core_compute_the_same(compared):
    assert compared["unet_size"] > 0.5
    assert compared["unet"] < 2e-5  # max abs error; values up to about 4
    assert compared["text"] < 2e-5
    assert compared["picture"] < 1e-5
    assert compared["same_ids"]


def test_host_and_core_compute_the_larger_families_the_same_also_patched_with_what_is_exported(
    checkout, tmp_path
):
    found = result_of("larger_in_host.py", checkout, str(tmp_path))
    assert {name: figures.pop("predicts") for name, figures in found.items()} == {
        "sd2": "epsilon",
        "sdxl": "epsilon",
        "sdxl, velocity": "v_prediction",
    }
    for figures in found.values():
        assert figures.pop("without the edit") > 0.1  # relative to the largest value, like the others
        assert len(figures) >= 4 and max(figures.values()) < 5e-6


def test_previews_take_one_latent_at_a_time_work_in_tiles_and_never_cost_the_training(compared):
    assert compared["batches"][:3] == [1, 1, 1] and compared["left"] == 0  # the VAE has left the device
    assert compared["tiled"] <= 1  # 8-bit steps
    for (texts, pictures), reason in zip(
        compared["watches"], ("the VAE failed (OutOfMemoryError)", "no VAE is connected"), strict=True
    ):
        assert texts == [f"Candy Stripes: no preview, {reason}"] and pictures == 1


def test_a_sequence_that_fails_gives_the_device_back(compared):
    assert compared["failed"] == ["device", "step", "released"]


def test_loading_the_pack_imports_nothing_heavy(compared):
    assert compared["nodes"] > 10 and compared["heavy_at_start"] == []


PRETENDED = {
    "absent": "raise metadata.PackageNotFoundError(name)",
    "too old": "return '0.32.9'",
    "newer": "return '9.9.1'",
}


@on_newest("checkout")
@pytest.mark.parametrize("state", PRETENDED)
def test_without_diffusers_nodes_say_what_to_install_and_a_newer_one_is_used(checkout, state, tmp_path):
    """The host's Python is made to believe that diffusers is missing, or of another version."""
    (tmp_path / "without").mkdir()
    answer = PRETENDED[state]
    (tmp_path / "without" / "sitecustomize.py").write_text(
        "from importlib import metadata\n_version = metadata.version\ndef version(name):\n    if name == "
        f"'diffusers':\n        {answer}\n    return _version(name)\nmetadata.version = version\n"
    )
    host = Host(checkout, tmp_path / "host", {"PYTHONPATH": str(tmp_path / "without")})
    try:
        graph = Graph()
        graph.add("CUL_DriftMap", model=(graph.step(graph.load()), CUL))
        outcome = host.wait(host.queue(graph), seconds=600)
        if state == "newer":
            assert outcome["status"]["status_str"] == "success", host.tail()
            assert "diffusers 9.9.1 is newer than" in host.log.read_text(errors="replace")
            return
        message = host.error_of(outcome)["exception_message"]
        assert ("is not installed" if state == "absent" else "has version 0.32.9") in message
        assert '-m pip install "diffusers>=0.33,<0.36"' in message and ".venv" in message
    finally:
        host.stop()
