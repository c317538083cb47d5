"""Step records: a model's history, as it is written into files and read back with checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..base.errors import CheckpointError, brief_repr
from ..concepts.concept import KINDS, LONGEST_NAME
from ..files.safetensors_format import read_header

FORMAT = "2"
"""Format of written histories. In format 1, weights were named by diffusers instead of checkpoint key."""
_READ = ("1", FORMAT)
_MOST_RECORDS = 10_000


@dataclass(frozen=True)
class StepRecord:
    """Record of one unlearning step, or of a merge of finished models.

    A merge's `request` has empty `concepts`, because the records before it name all that is forgotten. Its
    other keys are `merge`, the merger's config; `models`, the content hashes of the merged models; and
    `last_steps`, the `result` of each model's last record, or null. The last two can differ: a model opened
    from a file is rounded to the file's dtype, so its content hash is not that of the step that made it.

    Args:
        request: JSON of the `Request` (concepts, method, regularizers, training, seed), or of a merge.
        losses: last value of each named loss term.
        drift: checkpoint key -> [distance from the pretrained weights, distance from the step's start]
            (Frobenius norms).
        parent: content hash of the model that the step started from; for a merge, of the pretrained model.
        result: content hash of the resulting model.
        seconds: wall time of the step.
        finished: time of completion, ISO 8601, UTC.
        versions: package name -> version.
    """

    request: dict[str, Any]
    losses: dict[str, float]
    drift: dict[str, list[float]]
    parent: str
    result: str
    seconds: float
    finished: str
    versions: dict[str, str]

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the concepts that the step forgot; empty for a merge."""
        return tuple(concept["target"] for concept in self.request["concepts"])

    @property
    def has_changed(self) -> bool:
        """Whether the step changed any weight."""
        return self.result != self.parent

    @property
    def is_merge(self) -> bool:
        """Whether the record is of a merge instead of a step."""
        return "merge" in self.request


def read_history(path: Path) -> tuple[tuple[StepRecord, ...], dict[str, Any] | None]:
    """(history, source) from a file's header; see `history_in`.

    Raises:
        ModelError: the file is unreadable.
        CheckpointError: see `history_in`.
    """
    _, metadata, _ = read_header(path)
    return history_in(metadata, path.name)


def history_in(
    metadata: Mapping[str, str], file_name: str
) -> tuple[tuple[StepRecord, ...], dict[str, Any] | None]:
    """(history, source) from a file's metadata; ((), None) for a file that this library did not write.

    The source has the keys `name`, `size` in bytes and `sha256`.

    Raises:
        CheckpointError: the history is damaged, or its format is that of another version.
    """
    if "cul_format" not in metadata:
        return (), None
    if metadata["cul_format"] not in _READ:
        raise CheckpointError(
            f"{file_name!r} has history format {brief_repr(metadata['cul_format'])}, but this version reads "
            f"only {' and '.join(map(repr, _READ))}; update continual-unlearning."
        )
    try:
        records, source = json.loads(metadata["cul_history"]), json.loads(metadata["cul_source"])
        _check(isinstance(records, list) and len(records) <= _MOST_RECORDS)
        source = {name: source[name] for name in ("name", "size", "sha256")}
        _check(_is_text(source["name"]) and _is_number(source["size"]) and _is_text(source["sha256"], 64))
        history = tuple(map(record_from_json, records))
        _check(sum(len(record.targets) for record in history) <= _MOST_RECORDS)
        return history, source
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The history in {file_name!r} is damaged; use the file it was copied from."
        ) from error


def record_from_json(values: dict[str, Any]) -> StepRecord:
    """The record of untrusted JSON from a file; the type and size of every value are checked.

    Characters of texts are not checked: code that shows a record escapes them, and code that trains on its
    concepts builds `Concept`s, which check them.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: the JSON is no valid record.
    """
    record = StepRecord(**values)
    request = record.request
    _check_plain(values, levels=8)
    for concept in request["concepts"]:
        _check(concept.keys() == {"target", "kind", "anchor"} and concept["kind"] in KINDS)
        _check(all(_is_text(concept[name], LONGEST_NAME) for name in ("target", "anchor")))
    if record.is_merge:
        _check(_is_text(request["merge"]["name"]) and not request["concepts"])
        _check(len(request["models"]) == len(request["last_steps"]))
        _check(
            all(map(_is_text, request["models"]))
            and all(step is None or _is_text(step) for step in request["last_steps"])
        )
    else:
        _check(
            bool(request["concepts"])
            and all(_is_text(part["name"]) for part in (request["method"], *request["regularizers"]))
        )
        _check(all(type(request["training"][name]) is int for name in ("iterations", "seed")))
    _check(all(map(_is_number, (record.seconds, *record.losses.values()))))
    _check(all(len(pair) == 2 and all(map(_is_number, pair)) for pair in record.drift.values()))
    _check(all(map(_is_text, (record.parent, record.result, record.finished, *record.versions.values()))))
    return record


def _check(is_so: bool) -> None:
    if not is_so:
        raise ValueError("invalid record")


def _check_plain(value: Any, levels: int) -> None:
    """Raises ValueError for JSON nested deeper than `levels`, or with a number that is not finite or huge."""
    if isinstance(value, dict | list):
        _check(levels > 0)
        for item in value.values() if isinstance(value, dict) else value:
            _check_plain(item, levels - 1)
    elif not isinstance(value, str | bool | type(None)):
        _check(_is_number(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30


def _is_text(value: Any, longest: int = 255) -> bool:
    return isinstance(value, str) and len(value) <= longest


def library_versions() -> dict[str, str]:
    """Package name -> installed version, of the packages that results depend on."""
    versions = {}
    for package in ("continual-unlearning", "torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
