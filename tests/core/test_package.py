"""What the package says of itself."""

import tomllib
from importlib import metadata
from pathlib import Path

import cul_core

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place():
    """Where ComfyUI-Manager looks for it: it takes a pack with a dynamic version for none of the registry."""
    version = PROJECT["project"]["version"]
    assert version == cul_core.__version__
    files = [path for folder in ("cul_core", "nodes") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100 and not [
        path for path in files if f'"{version}"' in path.read_text(encoding="utf-8")
    ]


def test_an_installed_library_has_the_version_of_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"continual-unlearning": "7.8"}[name])
    assert cul_core._version(tmp_path) == "7.8"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "9"\n')
    assert cul_core._version(tmp_path) == "7.8"


def test_a_library_that_was_copied_alone_has_no_version_and_is_imported_all_the_same(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cul_core._version(tmp_path) == "unknown"


def test_the_tools_that_train_minicanvas_are_not_shipped():
    assert "cul_core.minicanvas.training*" in PROJECT["tool"]["setuptools"]["packages"]["find"]["exclude"]
    assert "cul_core/minicanvas/training/" in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    tools = ROOT / "cul_core" / "minicanvas" / "training"
    shipped = [path for path in (ROOT / "cul_core").rglob("*.py") if tools not in path.parents]
    text = "".join(path.read_text(encoding="utf-8") for path in shipped)
    assert len(shipped) > 50 and "minicanvas.training" not in text
