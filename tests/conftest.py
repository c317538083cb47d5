"""The whole suite runs in a process per core, of one thread each; files that are named, or slow tests, run in
one process."""

import os
from collections import Counter

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_survived = Counter()


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


def pytest_runtest_logreport(report):
    for name, value in report.user_properties if report.when == "call" else ():
        if name == "survived":
            kind, number = value
            _survived[kind] += number


def pytest_terminal_summary(terminalreporter):
    if _survived:
        terminalreporter.section("faults survived")
        for kind, number in sorted(_survived.items()):
            terminalreporter.write_line(f"{kind}: {number}")
