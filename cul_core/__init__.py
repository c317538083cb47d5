"""Continual unlearning for text-to-image diffusion models; a library that knows nothing of its host."""

import tomllib
from importlib import metadata
from pathlib import Path

from . import minicanvas as minicanvas  # registers its model family

_NAME = "continual-unlearning"


def _version(folder: Path) -> str:
    """The version in `pyproject.toml` of this checkout or node pack; else that of the installed package.

    It stands nowhere else: ComfyUI-Manager reads it from that file, where it must not be dynamic.
    """
    file = folder / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.is_file() else {}
    if project.get("name") == _NAME:
        return project["version"]
    try:
        return metadata.version(_NAME)
    except metadata.PackageNotFoundError:  # this folder was copied alone
        return "unknown"


__version__ = _version(Path(__file__).parents[1])
