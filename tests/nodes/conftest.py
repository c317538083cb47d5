"""The real host, once per version found."""

import shutil

import pytest
from hosts import HOSTS, HOW, IDS, Host


@pytest.fixture(scope="session", params=HOSTS or [None], ids=IDS)
def host(request, tmp_path_factory):
    """A running server."""
    if request.param is None:
        pytest.skip(HOW)
    running = Host(request.param, tmp_path_factory.mktemp("host"))
    yield running
    running.stop()
    shutil.rmtree(running.folder)  # pytest would keep the checkpoints of three runs
