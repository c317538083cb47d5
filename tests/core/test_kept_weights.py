"""Weights without a file, kept as one that is named by its content."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file

from cul_core.errors import ModelError
from cul_core.kept_weights import keep_weights
from cul_core.safetensor_files import read_header


def tensors():
    return {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.tensor([1.5]).half(), "mark": torch.empty(0), "scale": torch.tensor(0.5)}


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
    source = keep_weights(tmp_path, tensors() | {"lazy": Lazy(torch.zeros(2))}, lambda *progress: seen.append(progress))
    found = load_file(source.path)
    assert found.keys() == {"a", "b", "lazy", "mark", "scale"}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors().items())
    assert torch.equal(found["lazy"], torch.ones(2))
    header, _, start = read_header(source.path)
    assert all((start + entry["data_offsets"][0]) % {"F32": 4, "F16": 2}[entry["dtype"]] == 0 for entry in header.values())
    assert source.path.stem == source.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    assert seen == [(done, 10) for done in range(10)]


def test_equal_tensors_are_kept_once_and_a_damaged_file_is_written_anew(tmp_path):
    source = keep_weights(tmp_path, tensors())
    number = source.path.stat().st_ino
    assert keep_weights(tmp_path, dict(reversed(tensors().items()))) == source and source.path.stat().st_ino == number
    data = source.path.read_bytes()
    source.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(source.path, (1, 1))
    assert keep_weights(tmp_path, tensors()) == source and source.path.read_bytes() == data
    assert keep_weights(tmp_path, tensors() | {"a": torch.tensor([1.25]).half()}).path != source.path


def cancelled(done, count):
    if done == count - 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("more", "on_tensor", "error", "said"),
    [
        ({"c": torch.zeros(2, dtype=torch.float8_e4m3fn)}, lambda *_: None, ModelError, "'c' is held as float8.*load the"),
        ({"c": Lazy(torch.zeros(2), changes=[1.0, 0.0])}, lambda *_: None, ModelError, "changed while they were written"),
        ({}, cancelled, KeyboardInterrupt, None),
    ],
    ids=["fp8", "changing", "cancelled"],
)
def test_nothing_is_left_of_what_cannot_be_kept(more, on_tensor, error, said, tmp_path):
    with pytest.raises(error, match=said):
        keep_weights(tmp_path, tensors() | more, on_tensor)
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_goes_first(tmp_path):
    paths = [keep_weights(tmp_path, {"a": torch.full((100,), float(value))}).path for value in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    keep_weights(tmp_path, {"a": torch.zeros(100)})  # used again
    new = keep_weights(tmp_path, {"a": torch.full((100,), 9.0)}, largest_bytes=2 * paths[0].stat().st_size).path
    assert set(tmp_path.iterdir()) == {paths[0], new}
