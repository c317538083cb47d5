"""The whole suite runs in a process per core, of one thread each; files that are named, or slow tests, run in
one process."""

import os
from collections import Counter

from hosts import IDS, NEWEST, version_of
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = (
    *([version_of(NEWEST)] if NEWEST else ()),
    "tests/faults/test_kills.py",
    *IDS,
    "tests/faults/test_hostile_prompts.py",
    "tests/core/test_phenomenon.py",
)
"""What takes minutes, longest first."""

_survived = Counter()


def pytest_xdist_auto_num_workers(config):
    is_whole = config.args_source is not config.ArgsSource.ARGS and config.option.markexpr == "not slow"
    return min(os.cpu_count() or 1, 4) if is_whole else 0


class _ByHostOrFile(LoadScopeScheduling):
    """All tests of a host, and else all of a file, run in the same process and share what they have made.

    What takes longest starts first, so that no process is left with it at the end.
    """

    def _split_scope(self, nodeid):
        file, _, parameters = nodeid.partition("[")
        hosts = set(IDS).intersection(parameters.rstrip("]").split("-"))
        return hosts.pop() if hosts else file.partition("::")[0]

    def _assign_work_unit(self, node):
        if longest := next((scope for scope in LONGEST if scope in self.workqueue), None):
            self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config, log):
    return _ByHostOrFile(config, log)


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
