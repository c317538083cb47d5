"""Closed-form methods that solve all requests of a chain together, from the pretrained weights."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..base.errors import ConceptError
from ..concepts.concept import Concept
from ..models.network import Network
from ..parts.step_context import SolvedRequest, StepContext
from ..parts.text_maps import TextMap, expected_collateral
from ..parts.text_rows import POOLED, TEXT, Pairs, Responses, TextRows, kept_concepts
from .base import Method

logger = logging.getLogger(__name__)

_CAPTIONS = 24
"""Captions in which each concept stands beside its anchor."""
_MOST_OUTPUTS = 8192
"""Outputs of the matrices on which residues are measured: every k-th one of larger networks."""
_CROWDED = 0.4
"""Expected change of unrelated text from which a warning is logged."""


def made_up_names() -> Any:
    """The setting `made_up` of methods that keep `Problem.moment`."""
    return setting(
        1200,
        "Made-up names of each kind whose text is kept; they stand for all that nobody lists.",
        minimum=0,
        maximum=10_000,
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """What the requests of a chain ask of the matrices that read one kind of input.

    Apart from `requests`, nothing depends on the order of the requests.

    Args:
        rows: encoded text of the network.
        source: what the matrices read, `text` or `pooled`.
        requests: of the chain, in its order.
        readers: checkpoint key -> pretrained matrix (out, d).
        mixes_captions: whether the captions of `pairs` are drawn; else they are every k-th one, which may all
            show the same few subjects.
    """

    rows: TextRows
    source: str
    requests: Sequence[SolvedRequest]
    readers: Mapping[str, Tensor]
    mixes_captions: bool = False

    @property
    def width(self) -> int:
        """Width d of the rows."""
        return next(iter(self.readers.values())).shape[1]

    @cached_property
    def named(self) -> list[tuple[Concept, SolvedRequest]]:
        """All targets, each with its request."""
        return sorted(((c, request) for request in self.requests for c in request.concepts), key=repr)

    @property
    def targets(self) -> list[Concept]:
        return [concept for concept, _ in self.named]

    @property
    def kept(self) -> list[Concept]:
        """Concepts to retain that are no targets."""
        retain = [concept for request in self.requests for concept in request.retain]
        return kept_concepts(retain, self.targets)

    @property
    def captions(self) -> list[str]:
        """Anchor prompts of all requests."""
        return sorted({caption for request in self.requests for caption in request.anchor_prompts})

    def moment(self, made_up: int, described: Collection[str] = (), random_words: float = 0.0) -> Tensor:
        """Mean second moment (d, d) of kept text; see `TextRows.moment`."""
        return self.rows.moment(
            self.source, self.targets, self.kept, self.captions, made_up, described, random_words
        )

    def described(self, made_up: int, damping: float, share: float) -> set[str]:
        """The sentences with made-up names that may describe a target; see `TextRows.described`."""
        if not made_up or share > 1:
            return set()
        found = (
            self.rows.described(concept, self.captions_for(request), _CAPTIONS, made_up, damping, share)
            for concept, request in self.named
        )
        return set().union(*found)

    def captions_for(self, request: SolvedRequest) -> Sequence[str]:
        """Anchor prompts of a request, in the order in which `TextRows.pairs` spreads its picks over them."""
        captions = request.anchor_prompts
        return random.Random("captions").sample(captions, len(captions)) if self.mixes_captions else captions

    @cached_property
    def pairs(self) -> list[Pairs]:
        """Rows of each target beside their goals."""
        return [
            self.rows.pairs(self.source, concept, self.captions_for(request), _CAPTIONS)
            for concept, request in self.named
        ]

    @cached_property
    def residues(self) -> Residues:
        return Residues(self.pairs, self.rows.responses(self.source, lambda: _outputs(self.readers)))

    def check_room(self, directions: int, held: int = 0) -> None:
        """Warn if little room is left for directions beside the `held` ones.

        Raises:
            ConceptError: the directions are more than half of those that are free.
        """
        room = (self.width - held) // 2
        if directions > room:
            beside = f" beside {held} that are held exactly" if held else ""
            raise ConceptError(
                f"The requests have {directions} directions, and this model has room for {room} of its "
                f"{self.width}-wide {self.source} rows{beside}; take some requests back."
            )
        if (expected := expected_collateral(directions, self.width, held)) > _CROWDED:
            logger.warning(
                "%d of %d directions are removed; unrelated prompts may change by %.0f %%",
                directions,
                self.width - held,
                100 * expected,
            )


class ClosedForm(Method):
    """Base of methods whose edit is W' = W0 (I + M) for every matrix W0 that reads text, with one M for all.

    A method implements `fit`, which finds M for the rows that the matrices read. A pooled vector that the
    network reads gets a map of its own.

    A concept's residue is ||W' F - W0 A|| / ||W0 F - W0 A|| over its name's rows F, EOS and padding, and
    their goals A.

    Raises:
        ConceptError: a target has the same tokens as a concept to keep, or the encoder cuts its name.
    """

    is_closed_form = True
    solves_chain = True
    needs = ("text_readers",)
    draws_made_up_names = True  # at least for the rows of objects, of which some stand in a made-up style
    role = "text_inputs"
    mixes_captions = False  # see `Problem`

    def __init__(self, config: Config):
        super().__init__(config)
        self._report: dict[str, float] = {}

    def fit(self, problem: Problem) -> TextMap:
        """The map I + M, a function of the set of requests: their order changes no bit."""
        raise NotImplementedError

    def held(self, problem: Problem) -> int:
        """Number of directions that are held exactly."""
        return 0

    def removed(self, problem: Problem, solution: TextMap) -> int:
        """Number of directions that are removed."""
        return solution.up.shape[1]

    def solve(self, context: StepContext, requests: Sequence[SolvedRequest]) -> dict[str, Tensor]:
        rows = context.last_result.of(
            ("text rows", context.source), lambda: TextRows(context.network, context.source)
        )
        rows.watched_by(context)
        _check_names(context.network, requests)
        edits, self._report = {}, {}
        for source, readers in _readers(context).items():
            problem = Problem(rows, source, requests, readers, self.mixes_captions)
            solution = self.fit(problem)
            self._note(problem, solution)
            for key, weight in readers.items():
                context.check()
                change = torch.zeros_like(context.pretrained[key], dtype=torch.float32, device="cpu")
                change[:, : weight.shape[1]] = solution.change(weight.cpu().double())
                edits[key] = change
        return edits

    def _note(self, problem: Problem, solution: TextMap) -> None:
        source, residues = problem.source, problem.residues.of(solution)
        end = "" if source == TEXT else f"_{source}"
        rank, held = solution.up.shape[1], self.held(problem)
        self._report |= {
            f"rank{end}": rank,
            f"rank_there_is{end}": (problem.width - held) // 2,
            f"expected_collateral{end}": expected_collateral(
                self.removed(problem, solution), problem.width, held
            ),
            f"largest_residue{end}": max(residues),
        }
        if source == TEXT:
            named = zip(problem.targets, residues, strict=True)
            self._report |= {f"residue_of_{concept.name}": value for concept, value in named}

    def report(self) -> dict[str, float]:
        return self._report


@dataclass(frozen=True, eq=False)
class Residues:
    """Residues of concepts under a map.

    Args:
        pairs: rows of each concept beside their goals.
        matrices: what the matrices respond.
    """

    pairs: Sequence[Pairs]
    matrices: Responses

    def responses(self, solution: TextMap) -> Iterator[tuple[Tensor, Tensor]]:
        """(response to what is left of the difference, to the whole difference) of each concept."""
        return self.matrices.under(solution, self.pairs)

    def of(self, solution: TextMap) -> list[float]:
        """The residue of each concept."""
        return [(left.norm() / whole.norm()).item() for left, whole in self.responses(solution)]


def _readers(context: StepContext) -> dict[str, dict[str, Tensor]]:
    """What is read (`text`, `pooled`) -> key -> pretrained matrix (out, d), without columns for other
    inputs."""
    keys, readers = sorted(context.pretrained), context.text_readers
    found = {TEXT: {key: context.pretrained[key] for key in keys if key in readers}}
    if pooled := [key for key in keys if key not in readers]:
        width = context.network.encode([""]).pooled.shape[1]
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
