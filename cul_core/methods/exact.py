"""Exact: one closed-form solve over all requests so far, from the pretrained weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..base.errors import ConceptError
from ..concepts.concept import Concept
from ..models.network import Network
from ..models.weight_roles import keys_with_role
from ..parts.step_context import SolvedRequest, StepContext
from ..parts.text_maps import TextMap, expected_collateral, removal
from ..parts.text_rows import POOLED, TEXT, Pairs, Responses, TextRows
from .base import METHODS, Method

logger = logging.getLogger(__name__)

_CAPTIONS = 24
"""Captions in which each concept stands beside its anchor."""
_MOST_OUTPUTS = 8192
"""Outputs of the matrices on which residues are measured: every k-th one of larger networks."""
_SWEEPS = 8
"""Passes over the concepts in which their strengths settle."""
_CROWDED = 0.4
"""Expected change of unrelated text from which a warning is logged."""


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
    made_up: int = setting(
        1200,
        "Made-up names of each kind whose text is kept; they stand for all that nobody lists.",
        minimum=0,
        maximum=10_000,
    )
    damping: float = setting(
        1e-3,
        "Share of the mean variance that is added to every text direction.",
        minimum=1e-9,
        maximum=1.0,
    )
    SHARED: ClassVar[tuple[str, ...]] = ("made_up", "damping")


@METHODS.register(
    "exact",
    config=ExactConfig,
    display_name="Exact",
    description="Removes the text directions that tell the concepts from their anchors, with the least "
    "change of all other text. It solves all requests so far together, in seconds and without "
    "training, and each of them can be taken back.",
    paper="Our own, after LEACE (NeurIPS 2023, arXiv 2306.03819) and UCE (WACV 2024, arXiv 2308.14761)",
)
class Exact(Method):
    """W' = W0 (I + M) for every matrix W0 that reads text, with M solved over all requests together.

    S = L L^T is the damped second moment of kept text (`TextRows.moment`), in fp64 on the CPU. For each
    concept, u is the first left singular vector of L^-1 (F - A)^T, where rows F of target prompts stand
    beside their goals A (`TextRows.pairs`). M = -L Q Q^T L^-1, where Q is an orthonormal basis of all u: of
    all maps that remove these directions, I + M changes text distributed like S least (`text_maps.removal`).
    The edit's rank is the number of directions. A pooled vector that the network reads gets a map of its own.

    A concept's residue is ||W' F - W0 A|| / ||W0 F - W0 A|| over its name's rows, EOS and padding. With a
    wanted residue above 0, the concept's directions are removed in part, by strengths at which the residues
    are as wanted.

    Raises:
        ConceptError: a target has the same tokens as a concept to keep, the encoder cuts its name, or the
            requests have more directions than half of the text's width.
    """

    config: ExactConfig
    is_closed_form = True
    solves_chain = True
    needs = ("text_readers",)
    draws_made_up_names = True
    role = "text_inputs"

    def __init__(self, config: ExactConfig):
        super().__init__(config)
        self._report: dict[str, float] = {}

    def solve(self, context: StepContext, requests: Sequence[SolvedRequest]) -> dict[str, Tensor]:
        rows = context.last_result.of(
            ("text rows", context.source), lambda: TextRows(context.network, context.source)
        )
        rows.watched_by(context)
        _check_names(context.network, requests)
        edits = {}
        for source, readers in _readers(context).items():
            solution = self._solution(rows, source, readers, requests)
            for key, weight in readers.items():
                context.check()
                change = torch.zeros_like(context.pretrained[key], dtype=torch.float32, device="cpu")
                change[:, : weight.shape[1]] = solution.change(weight.cpu().double())
                edits[key] = change
        return edits

    def _solution(
        self, rows: TextRows, source: str, readers: Mapping[str, Tensor], requests: Sequence[SolvedRequest]
    ) -> TextMap:
        named = sorted(((c, request) for request in requests for c in request.concepts), key=_order)
        captions = [caption for request in requests for caption in request.anchor_prompts]
        retain = [concept for request in requests for concept in request.retain]
        targets = [concept for concept, _ in named]
        moment = rows.moment(source, targets, retain, captions, self.config.made_up)
        whitening = rows.whitening(source, moment, self.config.damping)
        factor = whitening.factor
        pairs = [rows.pairs(source, c, request.anchor_prompts, _CAPTIONS) for c, request in named]
        found = [
            whitening.directions(pair, request.method.directions)
            for pair, (_, request) in zip(pairs, named, strict=True)
        ]
        directions = torch.cat(found, dim=1)
        self._check_room(source, directions.shape[1], len(moment))
        owners = torch.tensor([i for i, own in enumerate(found) for _ in range(own.shape[1])])
        wanted = [request.method.residue for _, request in named]
        residues = _Residues(pairs, rows.responses(source, lambda: _outputs(readers)))
        solution = residues.settle(directions, factor, owners, wanted)
        self._note(source, solution, len(moment), dict(zip(targets, residues.of(solution), strict=True)))
        return solution

    def _check_room(self, source: str, count: int, width: int) -> None:
        if count > width // 2:
            raise ConceptError(
                f"The requests have {count} directions, and this model has room for {width // 2} of its "
                f"{width}-wide {source} rows; take some requests back."
            )
        if (expected := expected_collateral(count, width)) > _CROWDED:
            logger.warning(
                "%d of %d directions are removed; unrelated prompts may change by %.0f %%",
                count,
                width,
                100 * expected,
            )

    def _note(self, source: str, solution: TextMap, width: int, residues: Mapping[Concept, float]) -> None:
        end = "" if source == TEXT else f"_{source}"
        rank = solution.up.shape[1]
        self._report |= {
            f"rank{end}": rank,
            f"rank_there_is{end}": width // 2,
            f"expected_collateral{end}": expected_collateral(rank, width),
            f"largest_residue{end}": max(residues.values()),
        }
        if source == TEXT:
            self._report |= {f"residue_of_{concept.name}": value for concept, value in residues.items()}

    def report(self) -> dict[str, float]:
        return self._report


def _order(named: tuple[Concept, SolvedRequest]) -> str:
    concept, request = named
    return repr((concept, request))


def _readers(context: StepContext) -> dict[str, dict[str, Tensor]]:
    """What is read (`text`, `pooled`) -> key -> pretrained matrix (out, d), without columns for other
    inputs."""
    family, keys, readers = context.network.family, sorted(context.pretrained), context.text_readers
    found = {TEXT: {key: context.pretrained[key] for key in keys if key in readers}}
    if "pooled_readers" in family.roles and any(kind.is_pooled for kind in family.text_encoders):
        width = context.network.encode([""]).pooled.shape[1]
        pooled = keys_with_role(family, "pooled_readers", keys)
        found[POOLED] = {key: context.pretrained[key][:, :width] for key in pooled}
    return found


def _outputs(readers: Mapping[str, Tensor]) -> Tensor:
    """Rows (r, d) of all matrices on which responses are measured, in fp64."""
    step = math.ceil(sum(len(weight) for weight in readers.values()) / _MOST_OUTPUTS)
    return torch.cat([weight[::step] for weight in readers.values()]).cpu().double()


def _check_names(network: Network, requests: Sequence[SolvedRequest]) -> None:
    """Raises ConceptError for a target that the model reads as a name to keep, or that the encoder cuts."""

    @cache
    def by_tokens(retain: tuple[Concept, ...]) -> dict[tuple[int, ...], str]:
        return {network.tokens(concept.name): concept.name for concept in retain}

    for request in requests:
        kept = by_tokens(request.retain)
        for concept in request.concepts:
            tokens = network.tokens(concept.name)
            if tokens in kept:
                raise ConceptError(
                    f"The model reads {concept.name!r} and {kept[tokens]!r} as the same name, so it cannot "
                    "forget the one and keep the other; take one of them off its list."
                )
            if network.tokens(f"{concept.name} {concept.name}") == tokens:
                raise ConceptError(
                    f"{concept.name[:40]!r}... is longer than the model's text encoder reads ({len(tokens)} "
                    "tokens); shorten the name."
                )


class _Residues:
    """Residues of concepts under a map, by the responses of the matrices."""

    def __init__(self, pairs: Sequence[Pairs], responses: Responses):
        self._pairs, self._kept = pairs, responses

    def _responses(self, solution: TextMap) -> Iterator[tuple[Tensor, Tensor]]:
        """(response to what is left of the difference, to the whole difference) of each concept."""
        return self._kept.under(solution, self._pairs)

    def of(self, solution: TextMap) -> list[float]:
        """The residue of each concept."""
        return [(left.norm() / whole.norm()).item() for left, whole in self._responses(solution)]

    def settle(self, directions: Tensor, factor: Tensor, owners: Tensor, wanted: Sequence[float]) -> TextMap:
        """The map whose residues are as wanted, or the smallest that its directions allow.

        Args:
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
                strengths[own] = self._strength(number, *ends, goal)
        return removal(directions, factor, strengths)

    def _strength(self, number: int, without: TextMap, whole: TextMap, goal: float) -> float:
        """Least strength in [0, 1] at which the concept's residue is `goal`; else that of its least residue.

        What is left of the difference is linear in the strength, so its square is a quadratic.
        """
        left, difference = list(self._responses(without))[number]
        slope = list(self._responses(whole))[number][0] - left
        a, b = slope.square().sum(), (left * slope).sum()
        c = left.square().sum() - (goal * difference.norm()) ** 2
        if c <= 0:
            return 0.0
        root = b * b - a * c
        best = -b / a if root < 0 else (-b - root.sqrt()) / a
        return float(best.clamp(0, 1))
