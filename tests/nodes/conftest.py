"""The real host, once per version found."""

import shutil

import pytest
from hosts import HOSTS, HOW, IDS, Host, without_diffusers


@pytest.fixture(scope="session", params=HOSTS or [None], ids=IDS)
def host(request, tmp_path_factory):
    """A running server, in an environment without diffusers, as ComfyUI's is."""
    if request.param is None:
        pytest.skip(HOW)
    absent = without_diffusers(tmp_path_factory.mktemp("absent"))
    running = Host(request.param, tmp_path_factory.mktemp("host"), absent)
    yield running
    running.stop()
    shutil.rmtree(running.folder)  # pytest would keep the checkpoints of three runs
