"""Exact: one closed-form solve over all requests so far, from the pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..parts.text_maps import TextMap, removal, with_goals
from .base import METHODS
from .closed_form import ClosedForm, Problem, Residues, made_up_names

_SWEEPS = 8
"""Passes over the concepts in which their strengths settle."""


@dataclass(frozen=True)
class ExactConfig(Config):
    """Settings of `Exact`. All requests of a chain share `made_up` and `damping`."""

    residue: float = setting(
        0.0,
        "Share of each concept's difference from its anchor that stays: 0 removes all that can be removed, "
        "1 changes nothing.",
        minimum=0.0,
        maximum=1.0,
    )
    directions: int = setting(
        1,
        "Text directions that are removed for each concept. One is enough for a style.",
        minimum=1,
        maximum=16,
    )
    made_up: int = made_up_names()
    damping: float = setting(
        1e-3,
        "Share of the mean variance that is added to every text direction.",
        minimum=1e-9,
        maximum=1.0,
    )
    described: float = setting(
        0.3,
        "Made-up names whose text goes this share of a concept's way from its anchor may describe it, and "
        "are not kept. Above 1: all are kept.",
        minimum=0.05,
        maximum=2.0,
    )
    random_words: float = setting(
        0.5,
        "Share of kept text that has random words for names, in chains that forget more than styles.",
        minimum=0.0,
        maximum=0.9,
    )
    anchor_weight: float = setting(
        0.03,
        "Weight with which what is left of a style's text becomes that of its anchor, against all other "
        "text. 0: it is left as it is. Not used if a request of the chain has a residue above 0.",
        minimum=0.0,
        maximum=1e3,
    )
    SHARED: ClassVar[tuple[str, ...]] = ("made_up", "damping", "described", "random_words")


@METHODS.register(
    "exact",
    config=ExactConfig,
    display_name="Exact",
    description="Removes the text directions that tell the concepts from their anchors, with the least "
    "change of all other text. It solves all requests so far together, in seconds and without "
    "training, and each of them can be taken back.",
    paper="Our own, after LEACE (NeurIPS 2023, arXiv 2306.03819) and UCE (WACV 2024, arXiv 2308.14761)",
)
class Exact(ClosedForm):
    """W' = W0 (I + M) for every matrix W0 that reads text, with M solved over all requests together.

    S = L L^T is the damped second moment of kept text (`TextRows.moment`), in fp64 on the CPU. For each
    concept, u is the first left singular vector of L^-1 (F - A)^T, where rows F of target prompts stand
    beside their goals A (`TextRows.pairs`). M = -L Q Q^T L^-1, where Q is an orthonormal basis of all u: of
    all maps that remove these directions, I + M changes text distributed like S least (`text_maps.removal`).

    What is left of a style's text then becomes that of its anchor as far as `anchor_weight` pays for the
    change of other text (`text_maps.with_goals`), which adds two directions a style to the edit's rank.

    Made-up names that may describe a target are not kept (`TextRows.described`).

    With a wanted residue above 0, the concept's directions are removed in part, by strengths at which the
    residues are as wanted.

    Raises:
        ConceptError: see `ClosedForm`; or the requests have more directions than half of the text's width.
    """

    config: ExactConfig
    mixes_captions = True

    def removed(self, problem: Problem, solution: TextMap) -> int:
        return min(solution.up.shape[1], sum(request.method.directions for _, request in problem.named))

    def fit(self, problem: Problem) -> TextMap:
        config = self.config
        described = problem.described(config.made_up, config.damping, config.described)
        moment = problem.moment(config.made_up, described, config.random_words)
        whitening = problem.rows.whitening(problem.source, moment, config.damping)
        found = [
            whitening.directions(pair, request.method.directions)
            for pair, (_, request) in zip(problem.pairs, problem.named, strict=True)
        ]
        directions = torch.cat(found, dim=1)
        problem.check_room(directions.shape[1])
        owners = torch.tensor([i for i, own in enumerate(found) for _ in range(own.shape[1])])
        wanted = [request.method.residue for _, request in problem.named]
        solution = _settled(problem.residues, directions, whitening.factor, owners, wanted)
        weights = [
            request.method.anchor_weight if concept.kind == "style" else 0.0
            for concept, request in problem.named
        ]
        if any(wanted) or not any(weights):
            return solution
        main = [
            [weight**0.5 * side for side in pair.main]
            for pair, weight in zip(problem.pairs, weights, strict=True)
            if weight
        ]
        rows, goals = map(torch.cat, zip(*main, strict=True))
        return with_goals(solution, directions, whitening.factor, rows, goals)


def _settled(
    residues: Residues, directions: Tensor, factor: Tensor, owners: Tensor, wanted: Sequence[float]
) -> TextMap:
    """The map whose residues are as wanted, or the smallest that its directions allow.

    Args:
        residues: of the concepts.
        directions: U (d, n).
        factor: L (d, d).
        owners: (n,) number of the concept that each direction is of.
        wanted: residue of each concept.
    """
    strengths = torch.ones(len(owners), dtype=torch.float64)
    solution = removal(directions, factor, strengths)
    if not any(wanted):
        return solution
    for _ in range(_SWEEPS):
        for number, goal in enumerate(wanted):
            if not goal:
                continue
            own = owners == number
            ends = [removal(directions, factor, torch.where(own, end, strengths)) for end in (0.0, 1.0)]
            strengths[own] = _strength(residues, number, *ends, goal)
    return removal(directions, factor, strengths)


def _strength(residues: Residues, number: int, without: TextMap, whole: TextMap, goal: float) -> float:
    """Least strength in [0, 1] at which the concept's residue is `goal`; else that of its least residue.

    What is left of the difference is linear in the strength, so its square is a quadratic.
    """
    left, difference = list(residues.responses(without))[number]
    slope = list(residues.responses(whole))[number][0] - left
    a, b = slope.square().sum(), (left * slope).sum()
    c = left.square().sum() - (goal * difference.norm()) ** 2
    if c <= 0:
        return 0.0
    root = b * b - a * c
    best = -b / a if root < 0 else (-b - root.sqrt()) / a
    return float(best.clamp(0, 1))
