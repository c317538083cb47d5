"""Faults of every kind, counted; the counts are printed at the end."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections import Counter

import pytest

_SURVIVED = Counter()


@pytest.fixture(scope="session")
def survived():
    """What has been survived, by kind; a test counts up what it has checked."""
    return _SURVIVED


@pytest.fixture
def count(survived):
    """`count(kind)`, or `count(kind, number)`, once a fault of that kind was survived."""

    def add(kind, number=1):
        survived[kind] += number

    return add


def pytest_terminal_summary(terminalreporter):
    if _SURVIVED:
        terminalreporter.section("faults survived")
        for kind, number in sorted(_SURVIVED.items()):
            terminalreporter.write_line(f"{kind}: {number}")
