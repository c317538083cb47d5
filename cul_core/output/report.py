"""What happened to a model, as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..history.step_record import StepRecord
from ..history.unlearn_model import UnlearnModel
from ..training.step import StepReport

_LONGEST_LINE = 10_000


def printable(text: str) -> str:
    """One line of text that may come from a foreign file, as it may be shown: what would act on a terminal or
    turn the line is escaped."""
    if len(text) > _LONGEST_LINE:
        text = f"{text[:_LONGEST_LINE]}..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def record_text(record: StepRecord) -> str:
    """One step in one line: what was forgotten, when, how, from which parent; or which models were merged,
    when and how."""
    request = record.request
    total = sum(values[0] ** 2 for values in record.drift.values()) ** 0.5
    if record.is_merge:
        config = dict(request["merge"])
        name = config.pop("name")
        given = ", ".join(
            f"{key.replace('_', ' ')} {value}"
            for key, value in config.items()
            if value is not False and value != []
        )
        merged = [
            (step or model)[:12] for step, model in zip(request["last_steps"], request["models"], strict=True)
        ]
        return printable(
            f"merge of {', '.join(merged)}  {record.finished}  {name}{' with ' if given else ''}{given}, "
            f"drift {total:.3f}, model {record.result[:12]}"
        )
    regularizers = ", ".join(values["name"] for values in request["regularizers"]) or "no regularizer"
    return printable(
        f"{', '.join(record.targets)}  {record.finished}  {request['method']['name']} with {regularizers}, "
        f"{request['training']['iterations']} iterations, seed {request['training']['seed']}, "
        f"{record.seconds:.1f} s, drift {total:.3f}, model {record.result[:12]} from {record.parent[:12]}"
    )


def history_text(name: str, history: Sequence[StepRecord], source: Mapping[str, Any] | None) -> str:
    """Every step that a file called `name` has behind it; `source` is what `chain.read_history` gives with
    the history."""
    if source is None:
        return (
            f"{printable(name)} was not written by continual-unlearning: nothing in it says that "
            "anything was forgotten."
        )
    head = printable(
        f"{name}: {len(history)} step(s) from {source['name']} (SHA-256 {source['sha256'][:16]}...)"
    )
    return "\n".join(
        [head, *(f"{number:3}. {record_text(record)}" for number, record in enumerate(history, 1))]
    )


def brief_text(report: StepReport) -> str:
    """A finished step in a few words, for the node that made it."""
    record = report.record
    losses = f", loss {report.losses[0]:.3g} to {report.losses[-1]:.3g}" if report.losses else ""
    return printable(
        f"Forgot {', '.join(record.targets)} in {record.seconds:.0f} s ({len(report.losses)} "
        f"iterations{losses})"
    )


def step_text(report: StepReport) -> str:
    """A finished step: its record, its loss, and the figures of its regularizers."""
    lines = [f"Forgot {record_text(report.record)}"]
    if report.losses:
        lines.append(
            f"loss {report.losses[0]:.4g} at the first iteration, {report.losses[-1]:.4g} at the last"
        )
    lines += [f"{name.replace('_', ' ')}: {value:.3g}" for name, value in report.figures.items()]
    return "\n".join(lines)


def merge_text(model: UnlearnModel) -> str:
    """A model that has just been merged: what it has forgotten, and the record of its merge."""
    return f"{model_text(model)}\n{record_text(model.history[-1])}"


def model_text(model: UnlearnModel) -> str:
    """A model in one line: family, size, and what it has forgotten."""
    forgotten = ", ".join(dict.fromkeys(concept["target"] for concept in model.forgotten)) or "nothing yet"
    return printable(f"{model.family.display_name}, {model.source.size / 1e6:.1f} MB, forgotten: {forgotten}")
