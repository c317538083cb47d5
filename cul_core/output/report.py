"""Reports on steps, merges and models as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..history.step_record import StepRecord
from ..history.unlearn_model import UnlearnModel
from ..requests.request import effort
from ..training.solved_chain import forgotten_names
from ..training.step import StepReport

_LONGEST_LINE = 10_000


def printable(text: str) -> str:
    """Text from a possibly foreign file as one safe line: control and unprintable characters are escaped."""
    if len(text) > _LONGEST_LINE:
        text = f"{text[:_LONGEST_LINE]}..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def record_text(record: StepRecord) -> str:
    """One line about a step (targets, time, settings, parent) or about a merge (models, time, settings)."""
    request = record.request
    total = sum(values[0] ** 2 for values in record.drift.values()) ** 0.5
    if record.is_merge:
        config = dict(request["merge"])
        name = config.pop("name")
        settings = ", ".join(
            f"{key.replace('_', ' ')} {value}"
            for key, value in config.items()
            if value is not False and value != []
        )
        merged = [
            (step or model)[:12] for step, model in zip(request["last_steps"], request["models"], strict=True)
        ]
        return printable(
            f"merge of {', '.join(merged)}  {record.finished}  {name}{' with ' if settings else ''}"
            f"{settings}, drift {total:.3f}, model {record.result[:12]}"
        )
    regularizers = ", ".join(values["name"] for values in request["regularizers"]) or "no regularizer"
    changed = "" if record.has_changed else " (nothing changed)"
    return printable(
        f"{', '.join(record.targets)}{changed}  {record.finished}  {request['method']['name']} with "
        f"{regularizers}, {effort(request)}, seed {request['training']['seed']}, {record.seconds:.1f} s, "
        f"drift {total:.3f}, model {record.result[:12]} from {record.parent[:12]}"
    )


def history_text(name: str, history: Sequence[StepRecord], source: Mapping[str, Any] | None) -> str:
    """A line for every step in a file's history.

    Args:
        name: of the file.
        history: from `step_record.read_history`.
        source: from `step_record.read_history`; None for a file that is not ours.
    """
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


def _done(record: StepRecord) -> str:
    return "Forgot" if record.has_changed else "Nothing changed for"


def brief_text(report: StepReport) -> str:
    """One short line about a finished step, for its node."""
    record, losses = report.record, report.losses
    made = effort(record.request)
    if losses:
        made = f"{len(losses)} iterations, loss {losses[0]:.3g} to {losses[-1]:.3g}"
    return printable(f"{_done(record)} {', '.join(record.targets)} in {record.seconds:.1f} s ({made})")


def step_text(report: StepReport) -> str:
    """A finished step in several lines: record, loss, and the figures of its parts."""
    lines = [f"{_done(report.record)} {record_text(report.record)}"]
    if report.losses:
        lines.append(
            f"loss {report.losses[0]:.4g} at the first iteration, {report.losses[-1]:.4g} at the last"
        )
    lines += [f"{name.replace('_', ' ')}: {value:.3g}" for name, value in report.figures.items()]
    return "\n".join(lines)


def take_back_text(before: UnlearnModel, after: UnlearnModel) -> str:
    """What was taken back, what is still forgotten, and what of it cannot be taken back exactly."""
    (former, _), (exact, trained) = forgotten_names(before), forgotten_names(after)
    taken = [name for name in former if name not in exact]
    still = list(dict.fromkeys([*exact, *trained]))
    lines = [
        f"Taken back: {', '.join(taken)}.",
        f"Still forgotten: {', '.join(still)}." if still else "Nothing is forgotten any more.",
    ]
    if trained:
        lines.append(f"Cannot be taken back exactly, because training made it: {', '.join(trained)}.")
    elif exact:
        lines.append("Each of them can be taken back.")
    return "\n".join(map(printable, lines))


def merge_text(model: UnlearnModel) -> str:
    """A merged model in two lines: the model's, and the record of its merge."""
    return f"{model_text(model)}\n{record_text(model.history[-1])}"


def model_text(model: UnlearnModel) -> str:
    """A model in one line: family, size, forgotten targets."""
    forgotten = ", ".join(dict.fromkeys(concept["target"] for concept in model.forgotten)) or "nothing yet"
    return printable(f"{model.family.display_name}, {model.source.size / 1e6:.1f} MB, forgotten: {forgotten}")
