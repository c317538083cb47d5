"""A model is the same one in both places, and what the pack does to a host that lacks something."""

import json
import os
import subprocess

import pytest
from hosts import HOSTS, HOW, IDS, PACK, python_of


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
        "sd2": "noise",
        "sdxl": "noise",
        "sdxl, velocity": "velocity",
    }
    for figures in found.values():
        assert figures.pop("without the edit") > 0.1  # relative to the largest value, like the others
        assert len(figures) >= 4 and max(figures.values()) < 5e-6


def test_the_hosts_network_and_that_of_diffusers_predict_encode_and_train_the_same(checkout, tmp_path):
    """All figures are relative to the largest value, those of gradients and edits to the norm of all."""
    found = result_of("network_in_host.py", checkout, str(tmp_path))
    assert found.keys() == {"mini", "sd2", "sdxl", "sdxl, velocity"}
    for figures, seconds in found.values():
        assert figures.pop("the edit") > 0.1
        # AdamW's first updates are of the size of the rate, also where a gradient is nearly zero
        assert figures.pop("three iterations") < 2e-3
        assert len(figures) >= 6 and max(figures.values()) < 1e-5, figures
        assert set(seconds) == {"diffusers", "host"}


FLOWS = ("sd3,flux,flux-schnell,flux2,chroma", "lumina2,z-image,qwen-image,anima,hidream")


@pytest.mark.parametrize("names", FLOWS)
def test_flow_transformers_of_the_host_are_trained_and_saved_as_it_computes_them(checkout, names, tmp_path):
    """Every family that the host has; gradients against central differences, sampling against KSampler."""
    found = result_of("flows_in_host.py", checkout, str(tmp_path), names)
    assert {"sd3", "flux", "flux-schnell"} <= found.keys() or "lumina2" in found
    for name, (figures, roles, moved, (solved, residue, change)) in found.items():
        assert (
            min(roles.values()) >= 1 and roles["text_readers"] <= roles["text_inputs"] <= roles["reads_text"]
        )
        assert solved == roles["text_inputs"] and residue < 1 and change < 0.3, (name, residue, change)
        assert moved == {"conabl": roles["text_readers"], "esd": roles["text_readers"]}
        assert figures.pop("the edit") > 5e-3
        assert max(figures.pop("gradient"), figures.pop("gradient, checkpointing")) < 2e-3, name
        assert len(figures) == 8 and max(figures.values()) < 5e-6, (name, figures)


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


def test_a_host_has_no_diffusers_in_these_tests(host):
    found = subprocess.run(
        [python_of(host.checkout), "-c", "import diffusers"],
        env=os.environ | host.environment,
        capture_output=True,
        text=True,
    )
    assert "No module named 'diffusers'" in found.stderr
