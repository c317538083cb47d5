"""The host's folders: which files may be read, and where results go. No text of a user becomes a path except
through the host."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ..cul_core.base.errors import CheckpointError, ModelError, brief_repr
from ..cul_core.files.paths import check_portable, free_path

_STORE = "unlearning_chains"


def register() -> None:
    """Tell the host where MiniCanvas lies, so that stock loaders list it, and where finished steps are
    kept."""
    from ..cul_core.minicanvas.models import CHECKPOINT_PATH

    folder_paths.add_model_folder_path("checkpoints", str(CHECKPOINT_PATH.parent))
    folder_paths.add_model_folder_path(_STORE, os.path.join(folder_paths.models_dir, _STORE))


def store_folder() -> Path:
    return Path(folder_paths.get_folder_paths(_STORE)[0])


def model_snapshots() -> Path:
    """Where the weights of native models lie that have no file (see `model_snapshots.snapshot_model`)."""
    return store_folder() / "sources"


def model_files(*kinds: str) -> list[str]:
    """Names of .safetensors files in the host's lists `checkpoints`, `loras`, each once; see `_found`."""
    return [name for name, _ in _found(*kinds)]


def model_paths(*kinds: str) -> Iterator[Path]:
    """The files of `model_files`, each looked up when it is asked for."""
    return (path for _, path in _found(*kinds))


def _found(*kinds: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of every .safetensors file, from the first list that has it.

    The host lists pipes, and links that lead nowhere, but has no path for them; they are left out.
    """
    seen = set()
    for kind in kinds:
        for name in folder_paths.get_filename_list(kind):
            if name not in seen and _is_model(name) and (path := folder_paths.get_full_path(kind, name)):
                seen.add(name)
                yield name, Path(path)


def _is_model(name: str) -> bool:
    return name.lower().endswith(".safetensors")


def model_path(name: str, *kinds: str) -> Path:
    """The file of that name in the first of the lists that has it.

    Raises:
        ModelError: no list has it; not every host checks that before it runs a graph.
    """
    for kind in kinds:
        if _is_model(name) and name in folder_paths.get_filename_list(kind):
            if path := folder_paths.get_full_path(kind, name):
                return Path(path)
    raise ModelError(
        f"There is no file {brief_repr(name)} in ComfyUI's {' or '.join(kinds)}; press R and choose one of "
        "the list."
    )


def output_path(prefix: str) -> Path:
    """A new file in the host's output folder, named as the stock save nodes name theirs.

    Raises:
        CheckpointError: the prefix is no name on every system, or there is no such folder and it cannot be
        made.
    """
    check_portable(prefix)
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory()
        )
    except OSError as error:
        raise CheckpointError(
            f"Nothing can be written to {brief_repr(prefix)} ({error.strerror}); choose another folder."
        ) from error
    return free_path(Path(folder) / f"{name}_{counter:05}_.safetensors")


def workflow_metadata(prompt: object, extra: dict | None) -> dict[str, str]:
    """Header entries that hold the graph, as the stock save nodes write them, unless the user turned metadata
    off."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": prompt, **(extra or {})}
    return {name: json.dumps(value) for name, value in entries.items() if value is not None}
