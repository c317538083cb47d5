"""Edits as files that hosts' LoRA loaders apply to the source checkpoint: exact differences, or low-rank
approximations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import ConfigError
from ..files.paths import free_path
from ..files.safetensors_format import write_tensors
from ..history.unlearn_model import UnlearnModel


def patch_names(model: UnlearnModel) -> dict[str, str]:
    """Checkpoint key of every edited tensor -> its name in a host's network: without the leading `model.`."""
    return {key: key.removeprefix("model.") for key in model.edits}


def save_difference(model: UnlearnModel, path: Path | str, metadata: Mapping[str, str] | None = None) -> Path:
    """Write every edit whole, in fp32, as `<module>.diff` and `<module>.diff_b`; returns the path written,
    never an existing one.

    Loaded at strength 1 on the source checkpoint, it gives the edited model.

    Raises:
        CheckpointError: the folder cannot be written or is full.
    """
    return _write(
        model,
        path,
        dict(_difference(name, model.edits[ours]) for ours, name in patch_names(model).items()),
        metadata,
    )


def save_lora(
    model: UnlearnModel, path: Path | str, rank: int, metadata: Mapping[str, str] | None = None
) -> tuple[Path, float]:
    """Write every edited matrix as its best approximation of `rank`: (path written, share of the edits'
    energy retained).

    Energy is the sum of squares (Eckart-Young). Biases and norms, which have no rank, are written whole.
    Alpha is the rank, so that strength 1 gives the approximation itself.

    Raises:
        ConfigError: the rank is not positive.
        CheckpointError: the folder cannot be written or is full.
    """
    if rank < 1:
        raise ConfigError(f"The rank is {rank}; give a number of at least 1.")
    tensors, kept, total = {}, 0.0, 0.0
    for ours, name in patch_names(model).items():
        delta = model.edits[ours]
        energy = delta.double().square().sum().item()
        total += energy
        if delta.ndim < 2:
            key, value = _difference(name, delta)
            tensors[key] = value
            kept += energy
            continue
        left, values, right = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
        r = min(rank, len(values))
        kept += values[:r].square().sum().item()
        scale = values[:r].sqrt()
        module, tail = name.removesuffix(".weight"), (1,) * (delta.ndim - 2)
        tensors[f"{module}.lora_up.weight"] = (left[:, :r] * scale).float().reshape(len(delta), r, *tail)
        tensors[f"{module}.lora_down.weight"] = (
            (scale[:, None] * right[:r]).float().reshape(r, *delta.shape[1:])
        )
        tensors[f"{module}.alpha"] = torch.tensor(float(r))
    return _write(model, path, tensors, metadata), kept / total if total else 1.0


def _difference(name: str, delta: Tensor) -> tuple[str, Tensor]:
    module, _, leaf = name.rpartition(".")
    return f"{module}.diff_b" if leaf == "bias" else f"{module}.diff", delta


def _write(
    model: UnlearnModel, path: Path | str, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None
) -> Path:
    if not tensors:
        raise ConfigError("The model has no edits to write; forget something first.")
    path = free_path(Path(path))
    write_tensors(path, tensors, {**(metadata or {}), **model.metadata()})
    return path
