"""The host's folders: which files may be read, and where results go. No text of a user becomes a path except
through the host."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ..cul_core.base.errors import CheckpointError, ModelError, brief_repr
from ..cul_core.files.atomic_write import rehearse
from ..cul_core.files.paths import check_portable, check_writable, free_path

logger = logging.getLogger(__name__)
_STORE = "unlearning_chains"
"""Folder of what is kept, and its key in the host's extra_model_paths.yaml."""
_MODELS = ("checkpoints", "loras", "diffusion_models")
"""The host's lists of folders whose files it reads in the output folder too."""


def register() -> None:
    """Tell the host where MiniCanvas lies, so that stock loaders list it, and where finished steps are
    kept."""
    from ..cul_core.minicanvas.models import CHECKPOINT_PATH

    folder_paths.add_model_folder_path("checkpoints", str(CHECKPOINT_PATH.parent))
    folder_paths.add_model_folder_path(_STORE, os.path.join(folder_paths.models_dir, _STORE))


def store_folder() -> Path:
    """Where finished steps are kept: the first folder of that key that can be written, else one in the host's
    output or user folder."""
    listed = [Path(folder) for folder in folder_paths.get_folder_paths(_STORE)]
    others = [folder_paths.get_output_directory(), folder_paths.get_user_directory()]
    for folder in (*listed, *(Path(other) / _STORE for other in others)):
        if _can_be_written(folder):
            return folder
    return listed[0]


@lru_cache
def _can_be_written(folder: Path) -> bool:
    """Asked once for each folder while the host runs."""
    try:
        check_writable(folder)
    except CheckpointError as error:
        logger.warning("finished steps are not kept there: %s", error)
        return False
    return True


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
        folder, name, counter, _, _ = _numbered(prefix)
    except OSError as error:
        raise CheckpointError(
            f"Nothing can be written to {brief_repr(prefix)} ({error.strerror}); choose another folder."
        ) from error
    return free_path(Path(folder) / f"{name}_{counter:05}_.safetensors")


def _numbered(prefix: str) -> tuple:
    """The host's answer to a prefix, also for a linked folder of models, which it reads but does not write.

    Raises:
        CheckpointError: the prefix leads out of the output folder, to none of the host's folders of models.
        OSError: there is no such folder, and it cannot be made.
    """
    output = Path(folder_paths.get_output_directory())
    try:
        return folder_paths.get_save_image_path(prefix, str(output))
    except OSError:
        raise
    except Exception as error:  # the host's own, of no type
        folder = (output / prefix.replace("\\", "/")).parent
        listed = {os.path.normpath(path) for kind in _MODELS for path in folder_paths.get_folder_paths(kind)}
        if not any(os.path.normpath(place) in listed for place in (folder, *folder.parents)):
            raise CheckpointError(
                f"{brief_repr(prefix)} leads out of ComfyUI's output folder, to "
                f"{brief_repr(os.path.realpath(folder))}; choose another folder, or start ComfyUI with "
                "--output-directory."
            ) from error
        place = os.path.realpath(folder)
        os.makedirs(place, exist_ok=True)
        return folder_paths.get_save_image_path(os.path.basename(prefix.replace("\\", "/")), place)


def check_output(prefix: str | None) -> bool | str:
    """True if a file can be written for a prefix, else why not: an answer for `validate_inputs`.

    None, which stands for a link, is not checked.
    """
    try:
        if prefix is not None:
            rehearse(output_path(prefix))
    except CheckpointError as error:
        return str(error)
    return True


def workflow_metadata(prompt: object, extra: dict | None) -> dict[str, str]:
    """Header entries that hold the graph, as the stock save nodes write them, unless the user turned metadata
    off."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": prompt, **(extra or {})}
    return {name: json.dumps(value) for name, value in entries.items() if value is not None}
