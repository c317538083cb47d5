"""Weights without a file, kept as one that is named by its content."""

import hashlib
import os
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from cul_core.base.errors import Cancelled, ModelError
from cul_core.files.locks import lock_of, try_locked
from cul_core.files.safetensors_format import read_header
from cul_core.models.source import FileSource
from cul_core.store.eviction import hold
from cul_core.store.model_snapshots import snapshot_model


def tensors():
    return {
        "b": torch.arange(6.0).view(2, 3).t(),
        "a": torch.tensor([1.5]).half(),
        "mark": torch.empty(0),
        "scale": torch.tensor(0.5),
    }


class Lazy(torch.nn.Parameter):
    """As recent hosts give patched weights: the values come when they are moved."""

    def __new__(cls, tensor, changes=()):
        lazy = super().__new__(cls, tensor, requires_grad=False)
        lazy.changes = list(changes)
        return lazy

    def to(self, *_):
        return torch.ones_like(self.data) + (self.changes.pop() if self.changes else 0)


def test_the_file_holds_the_tensors_and_is_named_by_its_content(tmp_path):
    seen = []
    source = snapshot_model(
        tmp_path, tensors() | {"lazy": Lazy(torch.zeros(2))}, lambda *progress: seen.append(progress)
    )
    found = load_file(source.path)
    assert found.keys() == {"a", "b", "lazy", "mark", "scale"}
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors().items()
    )
    assert torch.equal(found["lazy"], torch.ones(2))
    header, _, start = read_header(source.path)
    assert all(
        (start + entry["data_offsets"][0]) % {"F32": 4, "F16": 2}[entry["dtype"]] == 0
        for entry in header.values()
    )
    assert source.path.stem == source.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    assert seen == [(done, 10) for done in range(10)]


def test_equal_tensors_are_kept_once_and_a_damaged_file_is_written_anew(tmp_path):
    source = snapshot_model(tmp_path, tensors())
    number = source.path.stat().st_ino
    assert (
        snapshot_model(tmp_path, dict(reversed(tensors().items()))) == source
        and source.path.stat().st_ino == number
    )
    data = source.path.read_bytes()
    source.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(source.path, (1, 1))
    assert snapshot_model(tmp_path, tensors()) == source and source.path.read_bytes() == data
    assert snapshot_model(tmp_path, tensors() | {"a": torch.tensor([1.25]).half()}).path != source.path


def cancelled(done, count):
    if done == count - 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("more", "on_tensor", "error", "said"),
    [
        (
            {"c": torch.zeros(2, dtype=torch.float8_e4m3fn)},
            lambda *_: None,
            ModelError,
            "'c' is held as float8.*load the",
        ),
        (
            {"c": Lazy(torch.zeros(2), changes=[1.0, 0.0])},
            lambda *_: None,
            ModelError,
            "changed while they were written",
        ),
        ({}, cancelled, KeyboardInterrupt, None),
    ],
    ids=["fp8", "changing", "cancelled"],
)
def test_nothing_is_left_of_what_cannot_be_kept(more, on_tensor, error, said, tmp_path):
    with pytest.raises(error, match=said):
        snapshot_model(tmp_path, tensors() | more, on_tensor)
    assert [path for path in tmp_path.iterdir() if path.name != "locks"] == []


def test_the_least_recently_used_goes_first(tmp_path):
    paths = [snapshot_model(tmp_path, {"a": torch.full((100,), float(value))}).path for value in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    snapshot_model(tmp_path, {"a": torch.zeros(100)})  # used again
    new = snapshot_model(
        tmp_path, {"a": torch.full((100,), 9.0)}, largest_bytes=2 * paths[0].stat().st_size
    ).path
    assert set(tmp_path.glob("*.safetensors")) == {paths[0], new}


def weights(number):
    return {"a": torch.full((100,), float(number))}


@pytest.fixture
def size(tmp_path_factory):
    return snapshot_model(tmp_path_factory.mktemp("one"), weights(0)).size


def age(folder):
    for path in folder.glob("*.safetensors"):
        os.utime(path, (1000, 1000))


def test_what_a_graph_uses_stays_and_goes_when_it_is_used_no_longer(tmp_path, size):
    """Six models over a bound of four in one graph, whose steps run after all were kept."""
    sources = []
    for number in range(6):
        sources.append(snapshot_model(tmp_path, weights(number), largest_bytes=4 * size))
        age(tmp_path)
    assert all(source.path.is_file() for source in sources)
    equal = [FileSource(source.path, source.size, source.sha256) for source in sources[:2]]
    for source in equal:
        hold(source.path, source)
    del source, sources[:4]
    snapshot_model(tmp_path, weights(7), largest_bytes=4 * size)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} >= {
        source.sha256 for source in (*equal, *sources)
    }
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_what_another_process_has_just_used_stays(tmp_path, size):
    for number in range(3):
        snapshot_model(tmp_path, weights(number))  # nothing in this process holds it
    new = snapshot_model(tmp_path, weights(3), largest_bytes=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    age(tmp_path)
    assert snapshot_model(tmp_path, weights(4), largest_bytes=size).path.is_file() and new.path.is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def failing(monkeypatch, owner, name, error, when=lambda path: True):
    original = getattr(owner, name)

    def fail(path, *args, **kwargs):
        if when(pathlib.Path(path)):
            raise error
        return original(path, *args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (os, "unlink", PermissionError(13, "it is open")),
        (os, "unlink", FileNotFoundError(2, "another process was faster")),
        (os, "utime", PermissionError(13, "read only")),
        (pathlib.Path, "stat", FileNotFoundError(2, "another process was faster")),
        (pathlib.Path, "stat", PermissionError(13, "locked")),
    ],
    ids=["open", "gone", "read only", "gone before stat", "locked"],
)
def test_neighbours_that_cannot_be_removed_or_looked_at_cost_nothing(
    owner, name, error, tmp_path, size, monkeypatch
):
    old = [snapshot_model(tmp_path, weights(number)).path for number in range(3)]
    age(tmp_path)
    failing(monkeypatch, owner, name, error, lambda path: name == "utime" or path in old)
    source = snapshot_model(tmp_path, weights(3), largest_bytes=size)
    assert load_file(source.path)["a"][0] == 3
    assert snapshot_model(tmp_path, weights(3), largest_bytes=size) == source


def test_a_file_that_is_cut_short_is_written_anew(tmp_path):
    path = snapshot_model(tmp_path, weights(1)).path
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    assert snapshot_model(tmp_path, weights(1)).path.read_bytes() == data


def test_a_file_that_another_process_works_on_is_not_evicted(tmp_path, size):
    path = snapshot_model(tmp_path, weights(1)).path
    age(tmp_path)
    with try_locked(lock_of(tmp_path / "locks", path)):
        snapshot_model(tmp_path, weights(2), largest_bytes=size)
        assert path.is_file()
    snapshot_model(tmp_path, weights(3), largest_bytes=size)
    assert not path.is_file()


def test_who_waits_for_another_process_that_writes_the_file_can_cancel(tmp_path):
    path = snapshot_model(tmp_path, weights(1)).path

    def cancel(done, count):
        if done:
            raise Cancelled("no longer")

    with try_locked(lock_of(tmp_path / "locks", path)), pytest.raises(Cancelled):
        snapshot_model(tmp_path, weights(1), cancel)
