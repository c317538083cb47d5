"""The host's lists of files, asked through stand-ins for its modules: no host is needed here."""

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


class Lists(ModuleType):
    """A stand-in for the host's `folder_paths`, which counts what it is asked."""

    def __init__(self, folders):
        super().__init__("folder_paths")
        self.folders, self.calls = folders, Counter()

    def get_filename_list(self, kind):
        self.calls["get_filename_list"] += 1
        return sorted(path.name for path in self.folders[kind].iterdir())

    def get_full_path(self, kind, name):
        self.calls["get_full_path"] += 1
        path = self.folders[kind] / name
        return str(path) if path.is_file() else None


@pytest.fixture
def lists(tmp_path):
    folders = {kind: tmp_path / kind for kind in ("checkpoints", "loras")}
    for folder in folders.values():
        folder.mkdir()
    return Lists(folders)


@pytest.fixture
def folders(lists, monkeypatch):
    """`nodes/_folders.py`, in a package that has no host and no other node."""
    for name, place in (("pack_of_test", ROOT), ("pack_of_test.nodes", ROOT / "nodes")):
        package = ModuleType(name)
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)
    arguments = SimpleNamespace(args=SimpleNamespace(disable_metadata=False))
    for name, module in {
        "folder_paths": lists,
        "comfy": ModuleType("comfy"),
        "comfy.cli_args": arguments,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("pack_of_test.nodes._folders")
    for name in [name for name in sys.modules if name.startswith("pack_of_test.")]:
        del sys.modules[name]


def fill(folder, count):
    for number in range(count):
        (folder / f"{number:03}.safetensors").write_bytes(b"")


def test_one_name_is_looked_up_and_not_every_file(folders, lists):
    fill(lists.folders["checkpoints"], 100)
    path = folders.model_path("050.safetensors", "checkpoints")
    assert path == lists.folders["checkpoints"] / "050.safetensors"
    assert lists.calls == {"get_filename_list": 1, "get_full_path": 1}


def test_all_files_are_found_by_one_question_for_each(folders, lists):
    fill(lists.folders["checkpoints"], 100)
    paths = list(folders.model_paths("checkpoints"))
    assert paths == [lists.folders["checkpoints"] / name for name in folders.model_files("checkpoints")]
    assert len(paths) == 100
    assert lists.calls == {"get_filename_list": 2, "get_full_path": 200}


def test_no_file_is_looked_for_before_one_is_needed(folders, lists):
    fill(lists.folders["checkpoints"], 100)
    assert next(folders.model_paths("checkpoints")).name == "000.safetensors"
    assert lists.calls["get_full_path"] == 1


def test_the_first_list_that_has_a_file_of_the_name_gives_it(folders, lists):
    for kind in ("checkpoints", "loras"):
        (lists.folders[kind] / "both.safetensors").write_bytes(b"")
    (lists.folders["loras"] / "lora.safetensors").write_bytes(b"")
    (lists.folders["checkpoints"] / "lost.safetensors").symlink_to("nowhere")
    (lists.folders["loras"] / "lost.safetensors").write_bytes(b"")
    for name, kind in (("both", "checkpoints"), ("lora", "loras"), ("lost", "loras")):
        path = folders.model_path(f"{name}.safetensors", "checkpoints", "loras")
        assert path == lists.folders[kind] / f"{name}.safetensors"
    names = ["both.safetensors", "lost.safetensors", "lora.safetensors"]
    assert sorted(folders.model_files("checkpoints", "loras")) == sorted(names)
    assert [path.name for path in folders.model_paths("checkpoints", "loras")] == [
        "both.safetensors",
        "lora.safetensors",
        "lost.safetensors",
    ]


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "pickle.ckpt", "../loras/a.safetensors", "lost.safetensors", ""]
)
def test_what_is_in_no_list_is_refused_whatever_lies_in_the_folder(name, folders, lists):
    (lists.folders["checkpoints"] / "pickle.ckpt").write_bytes(b"")
    (lists.folders["checkpoints"] / "lost.safetensors").symlink_to("nowhere")
    (lists.folders["loras"] / "a.safetensors").write_bytes(b"")
    error = sys.modules["pack_of_test.cul_core.base.errors"].ModelError
    with pytest.raises(error, match="There is no file .* in ComfyUI's checkpoints; press R"):
        folders.model_path(name, "checkpoints")
