"""Export edits for LoRA loaders: exact differences, or low-rank approximations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import ConfigError
from ..files.paths import free_path
from ..files.safetensors_format import write_tensors
from ..history.unlearn_model import UnlearnModel

_SMALL = 256
"""Smaller side of a matrix up to which a full SVD is fast enough."""
_OVERSAMPLING, _POWER_ITERATIONS = 8, 16


def patch_names(model: UnlearnModel) -> dict[str, str]:
    """Checkpoint key of every edited tensor -> its name in the host, without the leading `model.`."""
    return {key: key.removeprefix("model.") for key in model.edits}


def save_difference(model: UnlearnModel, path: Path | str, metadata: Mapping[str, str] | None = None) -> Path:
    """Write every edit in full in fp32, as `<module>.diff` and `<module>.diff_b`; returns the path written.

    At strength 1 on the source checkpoint the file gives the edited model. An existing file is not
    overwritten.

    Raises:
        ConfigError: the model has no edits.
        CheckpointError: the folder cannot be written or is full.
    """
    return _write(
        model,
        path,
        dict(_difference(name, model.edits[ours]) for ours, name in patch_names(model).items()),
        metadata,
    )


def save_lora(
    model: UnlearnModel,
    path: Path | str,
    rank: int,
    metadata: Mapping[str, str] | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[Path, float]:
    """Write every edited matrix as a rank-`rank` LoRA: (path written, share of the energy retained).

    Energy is the sum of squares, measured on the written matrices. A small matrix gets its best approximation
    (Eckart-Young), a large one a randomized approximation that loses at most another 0.1 % of the energy.
    Biases and norms are written in full. Alpha equals the rank, so strength 1 gives the approximation itself.
    The same edits make the same file.

    Args:
        model: whose edits to write.
        path: of the new file; an existing file is not overwritten.
        rank: of each approximation, at most the smaller side of its matrix.
        metadata: added to the file's own.
        on_tensor: called with (tensors done, their number); may raise to cancel, and no file is left behind.

    Raises:
        ConfigError: the rank is not positive, or the model has no edits.
        CheckpointError: the folder cannot be written or is full.
    """
    if rank < 1:
        raise ConfigError(f"The rank is {rank}; give a number of at least 1.")
    tensors, missed, total = {}, 0.0, 0.0
    names = patch_names(model)
    for done, (ours, name) in enumerate(names.items(), 1):
        delta = model.edits[ours]
        total += _energy(delta.double())
        if delta.ndim < 2:
            key, value = _difference(name, delta)
            tensors[key] = value
        else:
            up, down = _low_rank(delta.flatten(1).double(), rank)
            missed += _energy(delta.flatten(1).double() - up.double() @ down.double())
            module, tail = name.removesuffix(".weight"), (1,) * (delta.ndim - 2)
            tensors[f"{module}.lora_up.weight"] = up.reshape(*up.shape, *tail)
            tensors[f"{module}.lora_down.weight"] = down.reshape(len(down), *delta.shape[1:])
            tensors[f"{module}.alpha"] = torch.tensor(float(len(down)))
        on_tensor(done, len(names))
    return _write(model, path, tensors, metadata), 1 - missed / total if total else 1.0


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """fp32 factors (m, r) and (r, n) of an approximation of `matrix` (m, n), with r = min(rank, m, n).

    A large matrix gets a randomized SVD (Halko, Martinsson and Tropp 2011, arXiv 0909.4061) with a fixed
    seed. On white noise, a hard spectrum, 4 power iterations retained up to 1 % less of the energy than the
    best approximation, 16 up to 0.06 % less.
    """
    smaller, sampled = min(matrix.shape), rank + _OVERSAMPLING
    if smaller <= _SMALL or 2 * sampled > smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix.float(), q=sampled, niter=_POWER_ITERATIONS)
        right = right.T
    scale = values[:rank].sqrt()
    return (left[:, :rank] * scale).float(), (scale[:, None] * right[:rank]).float()


def _energy(values: Tensor) -> float:
    return values.square().sum().item()


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
