"""Faults of every kind, counted; `tests/conftest.py` prints the counts at the end."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@pytest.fixture
def count(request):
    """`count(kind)`, or `count(kind, number)`, once a fault of that kind was survived."""

    def add(kind, number=1):
        request.node.user_properties.append(("survived", [kind, number]))

    return add
