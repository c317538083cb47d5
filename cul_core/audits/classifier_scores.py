"""Scores from classified images: UA, clean forgetting, leak, IRA, CRA and their summary H."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

METRICS = ("ua", "clean", "leak", "ira_declared", "ira_hidden", "cra", "cra_clean", "h")
LABELS = {
    "ua": "UA",
    "clean": "clean",
    "leak": "leak",
    "ira_declared": "IRA decl.",
    "ira_hidden": "IRA hidden",
    "cra": "CRA",
    "cra_clean": "CRA clean",
    "h": "H",
}


@dataclass(frozen=True)
class Shot:
    """One image of an evaluation.

    Args:
        prompt: prompt of the image.
        style: style that the prompt names or describes.
        object: object that the prompt names.
        role: `target`, `declared` or `hidden`; `alias` for a description of a target.
        index: number of the image among those of this prompt.
    """

    prompt: str
    style: str
    object: str
    role: str
    index: int


@dataclass(frozen=True)
class Verdict:
    """The classifier's labels of one image; an empty string is the reject class."""

    style: str
    object: str


@dataclass(frozen=True)
class Scores:
    """Metrics in percent; None where nothing was measured.

    Args:
        ua: unlearning accuracy, 100 minus the share of target prompts that still show the target
            (UnlearnCanvas).
        clean: share of target prompts whose image lacks the target, shows the rest of the prompt and is
            recognized at all.
        leak: share of descriptions of the targets whose image still shows the target.
        ira_declared: in-domain retain accuracy of the concepts to retain.
        ira_hidden: in-domain retain accuracy of the concepts that no request names; the headline.
        cra: cross-domain retain accuracy, over all named prompts, targets included (CUIG).
        cra_clean: cross-domain retain accuracy without the targets' prompts (UnlearnCanvas).
        h: harmonic mean of clean, ira_hidden and cra_clean.
        intervals: metric -> 95 % bootstrap interval over images.
        per_concept: name -> {role, style accuracy, object accuracy, number of images}.
    """

    ua: float | None
    clean: float | None
    leak: float | None
    ira_declared: float | None
    ira_hidden: float | None
    cra: float | None
    cra_clean: float | None
    h: float | None
    intervals: dict[str, tuple[float, float]]
    per_concept: dict[str, dict]

    def to_json(self) -> dict:
        return asdict(self)


def harmonic_mean(values: Sequence[float | np.ndarray | None]) -> float | np.ndarray | None:
    """Harmonic mean, elementwise for arrays of resamples; 0 where a value is 0, None if one is missing."""
    if any(value is None for value in values):
        return None
    with np.errstate(divide="ignore"):
        return len(values) / sum(1 / np.asarray(value, dtype=float) for value in values)


def _metrics(cells: dict[tuple[str, str], np.ndarray]) -> dict[str, float | np.ndarray]:
    """Metrics by name, in percent, in the shape of the leading axes.

    Args:
        cells: (role, concept) -> flags (..., images, 3): own concept seen, other domain right, clean. Leading
            axes are bootstrap resamples.
    """

    def mean(roles: tuple[str, ...], column: int):
        shares = [flags[..., column].mean(-1) for (role, _), flags in cells.items() if role in roles]
        return 100 * np.mean(shares, axis=0) if shares else None

    own = mean(("target",), 0)
    out = {
        "ua": None if own is None else 100 - own,
        "clean": mean(("target",), 2),
        "leak": mean(("alias",), 0),
        "ira_declared": mean(("declared",), 0),
        "ira_hidden": mean(("hidden",), 0),
        "cra": mean(("target", "declared", "hidden"), 1),
        "cra_clean": mean(("declared", "hidden"), 1),
    }
    return out | {"h": harmonic_mean([out["clean"], out["ira_hidden"], out["cra_clean"]])}


def score(
    shots: Sequence[Shot],
    verdicts: Sequence[Verdict],
    domain: str = "style",
    resamples: int = 500,
    seed: int = 0,
) -> Scores:
    """Scores of classified images; every concept has the same weight, whatever the number of its images.

    Args:
        shots: the images.
        verdicts: label of each image.
        domain: domain of the targets, `style` or `object`; the other one is the cross domain.
        resamples: bootstrap resamples for the intervals.
        seed: of the resamples.
    """
    other = {"style": "object", "object": "style"}[domain]
    flags: dict[tuple[str, str], list[tuple[bool, bool, bool]]] = {}
    for shot, verdict in zip(shots, verdicts, strict=True):
        asked, seen = getattr(shot, domain), getattr(verdict, domain)
        right_other = getattr(verdict, other) == getattr(shot, other)
        flags.setdefault((shot.role, asked), []).append(
            (seen == asked, right_other, seen not in (asked, "") and right_other)
        )
    cells = {key: np.array(value, dtype=float) for key, value in sorted(flags.items())}
    rng = np.random.default_rng(seed)
    drawn = {
        key: value[rng.integers(len(value), size=(resamples, len(value)))] for key, value in cells.items()
    }
    point, spread = _metrics(cells), _metrics(drawn)
    per_concept = {
        f"{name} (described)" if role == "alias" else name: {
            "role": role,
            domain: 100 * value[:, 0].mean(),
            other: 100 * value[:, 1].mean(),
            "pictures": len(value),
        }
        for (role, name), value in cells.items()
    }
    return Scores(
        **{name: None if value is None else round(float(value), 2) for name, value in point.items()},
        intervals={
            name: tuple(np.percentile(value, (2.5, 97.5)).round(2).tolist())
            for name, value in spread.items()
            if value is not None
        },
        per_concept=per_concept,
    )


def table(rows: Sequence[tuple[str, dict]]) -> str:
    """The scores as aligned text: one line per (label, scores), one column per metric."""
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{LABELS[name]:>11}" for name in METRICS)]
    for label, scores in rows:
        cells = ["-" if scores[name] is None else f"{scores[name]:.1f}" for name in METRICS]
        lines.append(label.ljust(width) + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
