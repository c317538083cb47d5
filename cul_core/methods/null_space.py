"""Null Space: the difference of each concept from its anchor is erased outside the span of what is held."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..base.errors import ConceptError
from ..concepts.concept import display_name
from ..parts.subspace import complement_basis, orthonormal_basis
from ..parts.text_maps import TextMap, ridge_map
from ..parts.text_rows import POOLED, TEXT, encoded
from .base import METHODS
from .closed_form import ClosedForm, Problem, made_up_names

_LEAST_SHARE = 1e-3
"""Share of a direction outside the span of what is held, below which it counts as inside."""
_HALVINGS = 40
"""Steps of the search for the weight that gives a wanted residue."""
_WEIGHTS = (-9.0, 3.0)
"""Powers of ten between which that weight is searched."""
_DOMINANT = 0.9
"""Share of the energy of earlier concepts' output changes that their dominant directions hold."""


@dataclass(frozen=True)
class NullSpaceConfig(Config):
    """Settings of `NullSpace`. All requests of a chain share all but `directions`."""

    directions: int = setting(
        1,
        "Text directions that are erased for each concept. One is enough for a style.",
        minimum=1,
        maximum=16,
    )
    keep_weight: float = setting(
        1e-3,
        "Weight of kept text that is not held exactly (mu): more keeps more and forgets less.",
        minimum=1e-9,
        maximum=1e6,
    )
    ridge: float = setting(1e-6, "Weight of the change of the matrices (lambda).", minimum=1e-12, maximum=1e6)
    residue: float = setting(
        0.0,
        "Share of the concepts' difference from their anchors that stays in the mean, by a weight that is "
        "searched instead of `keep_weight`. 0: no search.",
        minimum=0.0,
        maximum=1.0,
    )
    made_up: int = made_up_names()
    overlap: float = setting(
        1.0,
        "Share of a request's output change inside the main output directions of earlier requests above "
        "which it leaves them out, as CEASE does at 0.3; the order of the requests then matters. 1: never.",
        minimum=0.0,
        maximum=1.0,
    )
    SHARED: ClassVar[tuple[str, ...]] = ("keep_weight", "ridge", "residue", "made_up", "overlap")


@METHODS.register(
    "null_space",
    config=NullSpaceConfig,
    display_name="Null Space",
    description="Erases what tells the concepts from their anchors, and leaves the text of names to keep "
    "exactly as it is. It solves all requests so far together, without training, and each of them can be "
    "taken back.",
    paper="After OCE (arXiv 2605.28902), SPEED (arXiv 2503.07392) and CEASE (arXiv 2610.01989)",
)
class NullSpace(ClosedForm):
    """W' = W0 (I - C^T C B (B^T (C^T C + mu d K0 + lambda I) B)^-1 B^T), for every matrix W0.

    Rows C are the main components of the concepts' differences from their goals (`TextRows.pairs`), in units
    of the norm of all. K0 is the second moment of kept text, of trace 1 (`TextRows.moment`), with mu
    `keep_weight` and lambda `ridge`. B is a basis of the complement of the span of what is held: rows of the
    prompts of names to keep, of the anchors and of the empty prompt, and the rows that all prompts share. As
    anchors are held, a difference that becomes 0 means that W' gives a target W0's output for its anchor.

    With `overlap` below 1, a request's columns of W0 C^T lose their part in the dominant output directions of
    earlier requests, so that the order of the requests matters.

    Raises:
        ConceptError: see `ClosedForm`; or a target's difference lies in the span of what is held, or the
            requests have more directions than half of those that are free.
    """

    config: NullSpaceConfig

    def __init__(self, config: NullSpaceConfig):
        super().__init__(config)
        self._held: dict[str, int] = {}

    def held(self, problem: Problem) -> int:
        return self._held[problem.source]

    def fit(self, problem: Problem) -> TextMap:
        held = _held_rows(problem)
        basis = orthonormal_basis(torch.cat(list(held.values())))
        count = self._held[problem.source] = basis.shape[1]
        own = [
            pair.differences[: request.method.directions] / pair.differences.norm()
            for pair, (_, request) in zip(problem.pairs, problem.named, strict=True)
        ]
        free = complement_basis(basis)
        for concept, rows in zip(problem.targets, own, strict=True):
            share = check_free(concept.name, rows, free, held)
            if problem.source == TEXT:
                self._report[f"share_free_of_{concept.name}"] = share
        differences = torch.cat(own)
        problem.check_room(len(differences), count)
        kept = problem.width * problem.moment(self.config.made_up)
        floor = self.config.ridge * torch.eye(problem.width, dtype=torch.float64)

        def solution(weight: float) -> TextMap:
            found = ridge_map(differences, torch.zeros_like(differences), weight * kept + floor, free)
            return self._apart(problem, found, [len(rows) for rows in own])

        if not self.config.residue:
            return solution(self.config.keep_weight)
        low, high = _WEIGHTS
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            is_less = mean(problem.residues.of(solution(10**middle))) < self.config.residue
            low, high = (middle, high) if is_less else (low, middle)
        return solution(10**low)

    def _apart(self, problem: Problem, found: TextMap, counts: list[int]) -> TextMap:
        """The map in which each request's output change overlaps at most as wanted with earlier ones.

        Args:
            problem: whose requests are in the chain's order.
            found: map that has one column for each direction.
            counts: number of directions of each concept.
        """
        if self.config.overlap >= 1:
            return found
        owners = [
            request for (_, request), count in zip(problem.named, counts, strict=True) for _ in range(count)
        ]
        up, earlier = found.up.clone(), []
        for request in problem.requests:
            own = [i for i, owner in enumerate(owners) if owner is request]
            if earlier:
                past = TextMap(up[:, earlier], found.down[earlier])
                up[:, own] = apart(up[:, own], past, problem.residues.matrices.factor, self.config.overlap)
            earlier += own
        return TextMap(up, found.down)


def _held_rows(problem: Problem) -> dict[str, Tensor]:
    """Prompt that is held -> its rows (n, d), in an order that does not depend on that of the requests."""
    rows, source = problem.rows, problem.source
    anchors = sorted({display_name(concept.anchor) for concept in problem.targets} | {""})
    prompts = list(dict.fromkeys([*anchors, *(concept.prompt for concept in problem.kept)]))
    held = dict(zip(prompts, rows.words(source, prompts), strict=True))
    if source != POOLED and rows.network.shared_rows:
        shared = encoded(rows.network, [""]).text[0, : rows.network.shared_rows].cpu().double()
        held[""] = torch.cat([shared, held[""]])
    return held


def check_free(name: str, rows: Tensor, free: Tensor, held: dict[str, Tensor]) -> float:
    """The share of a concept's directions that lies outside the span of what is held.

    Args:
        name: of the concept.
        rows: directions (n, d).
        free: orthonormal basis (d, m) of the complement of the span.
        held: prompt that is held -> its rows (k, d).

    Raises:
        ConceptError: the share is next to nothing.
    """
    share = ((rows @ free).norm() / rows.norm()).item()
    if share >= _LEAST_SHARE:
        return share
    nearest = max(held, key=lambda prompt: (rows @ orthonormal_basis(held[prompt])).norm().item())
    raise ConceptError(
        f"What tells {name!r} from its anchor lies inside the span of the {len(held)} prompts that are held "
        f"exactly, nearest to {nearest!r}; keep fewer names, or choose the method exact."
    )


def apart(up: Tensor, past: TextMap, factor: Tensor, most: float) -> Tensor:
    """Columns (d, n) without their part in the dominant output directions of `past`, if it is too large.

    Args:
        up: columns (d, n) of a map.
        past: earlier part of the map.
        factor: R (m, d), with ||R x|| the norm of the outputs' response to x, of all matrices together.
        most: largest share of the norm that may be in them, 0 to 1.
    """
    # past has the output directions of R inner
    inner = past.up @ torch.linalg.qr(past.down.T, mode="r").R.T
    left, values, right = torch.linalg.svd(factor @ inner, full_matrices=False)
    energy = values.square().cumsum(0)
    count = int((energy < _DOMINANT * energy[-1]).sum()) + 1
    inside = left[:, :count].T @ (factor @ up)
    if inside.norm() <= most * (factor @ up).norm():
        return up
    return up - inner @ (right[:count].T / values[:count]) @ inside
