"""The whole suite runs in a process per core, of one thread each; files that are named, or slow tests, run in
one process."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config):
    is_whole = config.args_source is not config.ArgsSource.ARGS and config.option.markexpr == "not slow"
    return min(os.cpu_count() or 1, 4) if is_whole else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All tests of a host, and else all of a file, run in the same process and share what they have made."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        host = parameters.get("host", parameters.get("checkout"))
        item.add_marker(pytest.mark.xdist_group(host.name if host else item.path.stem))
