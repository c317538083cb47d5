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
def lists(request, tmp_path):
    if "host" in request.fixturenames:
        return request.getfixturevalue("host")
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


# --- where results and finished steps go


class Host(Lists):
    """A stand-in that also says where the host writes, as recent versions do."""

    def __init__(self, base):
        super().__init__({kind: base / "models" / kind for kind in ("checkpoints", "loras")})
        self.base, self.stores = base, [base / "models/unlearning_chains"]
        for name in ("output", "user", "models"):
            (base / name).mkdir()

    def get_output_directory(self):
        return str(self.base / "output")

    def get_user_directory(self):
        return str(self.base / "user")

    def get_folder_paths(self, kind):
        if kind == "unlearning_chains":
            return list(map(str, self.stores))
        return [str(self.base / "output" / kind), str(self.base / "models" / kind)]

    def get_save_image_path(self, prefix, output):
        folder = Path(output, prefix).parent
        if Path(output).resolve() not in (folder.resolve(), *folder.resolve().parents):
            raise Exception("**** ERROR: Saving image outside the output folder is not allowed.")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder), Path(prefix).name, 1, "", prefix


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def linked(host, name, target="disk"):
    """The host's output/NAME as a link to another disk."""
    (host.base / target).mkdir()
    (host.base / "output" / name).symlink_to(host.base / target, target_is_directory=True)
    return host.base / target


@pytest.mark.parametrize(
    "prefix", ["checkpoints/unlearned", "checkpoints/mine/unlearned", "loras\\unlearned"]
)
def test_a_linked_folder_of_models_is_written_through_the_link(prefix, folders, host):
    kind, *_, name = prefix.replace("\\", "/").split("/")
    disk = linked(host, kind)
    path = folders.output_path(prefix.replace("\\", "/"))
    assert disk.resolve() in path.parents and path.name == f"{name}_00001_.safetensors"
    assert folders.check_output(prefix.replace("\\", "/")) is True
    assert not [path for path in disk.rglob("*") if path.is_file()]


@pytest.mark.parametrize("prefix", ["pictures/unlearned", "elsewhere/checkpoints/a", "pictures/a/b"])
def test_another_link_out_of_the_output_folder_is_refused_before_anything_runs(prefix, folders, host):
    linked(host, prefix.partition("/")[0])
    said = folders.check_output(prefix)
    assert "leads out of ComfyUI's output folder" in said and "disk" in said and "--output-directory" in said


@pytest.mark.parametrize("prefix", ["../a", "a:b", "CON", "a" * 250])
def test_a_prefix_that_is_no_name_is_refused_before_anything_runs(prefix, folders, host):
    assert "give another one" in folders.check_output(prefix)


def test_a_prefix_that_comes_over_a_link_is_not_checked(folders, host):
    assert folders.check_output(None) is True


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_runs(folders, host, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in folders.check_output("checkpoints/a")
    (host.base / "output/file").write_bytes(b"")
    assert "file" in folders.check_output("file/a")


def blocked(folder):
    """A folder that cannot be made, whoever asks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_bytes(b"")
    return folder


def test_steps_are_kept_in_the_first_folder_that_can_be_written(folders, host, caplog):
    host.stores.insert(0, host.base / "of_extra_model_paths")
    assert folders.store_folder() == host.base / "of_extra_model_paths"
    assert folders.model_snapshots().parent == host.base / "of_extra_model_paths"


def test_a_read_only_folder_of_models_has_a_fallback(folders, host, caplog):
    blocked(host.stores[0])
    for _ in range(2):
        assert folders.store_folder() == host.base / "output/unlearning_chains"
    assert caplog.text.count("finished steps are not kept there") == 1


def test_the_fallback_may_be_the_user_folder(folders, host):
    blocked(host.stores[0])
    blocked(host.base / "output/unlearning_chains")
    assert folders.store_folder() == host.base / "user/unlearning_chains"
    assert folders.model_snapshots() == host.base / "user/unlearning_chains/sources"


def test_where_nothing_can_be_written_the_first_folder_is_named(folders, host):
    for folder in (
        host.stores[0],
        host.base / "output/unlearning_chains",
        host.base / "user/unlearning_chains",
    ):
        blocked(folder)
    assert folders.store_folder() == host.stores[0]
