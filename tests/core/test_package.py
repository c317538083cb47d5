"""What the package says of itself."""

import tomllib
from pathlib import Path

import cul_core

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_of_the_package_is_that_of_the_library():
    assert PROJECT["project"]["version"] == cul_core.__version__


def test_the_tools_that_train_minicanvas_are_not_shipped():
    assert "cul_core.minicanvas.training*" in PROJECT["tool"]["setuptools"]["packages"]["find"]["exclude"]
    assert "cul_core/minicanvas/training/" in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    tools = ROOT / "cul_core" / "minicanvas" / "training"
    shipped = [path for path in (ROOT / "cul_core").rglob("*.py") if tools not in path.parents]
    text = "".join(path.read_text(encoding="utf-8") for path in shipped)
    assert len(shipped) > 50 and "minicanvas.training" not in text
