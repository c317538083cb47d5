"""Gradient projection: keep the key and value matrices' response to the text of concepts to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..base.errors import ConceptError
from ..concepts.concept import Concept, display_name
from ..concepts.name_lists import LISTS, listed_names, parse_names
from ..models.network import Network
from ..parts.prompt_vectors import ROWS, decoy_concepts, prompt_rows, target_vector
from ..parts.step_context import StepContext
from ..parts.subspace import Subspace, orthonormal_basis
from .base import REGULARIZERS, Regularizer

LEAST_TARGET_ENERGY = 0.2
_LEAST_BESIDE_LISTS = 0.4
_NEAR_TARGET_COSINE = 0.9
_CENTRE_NAMES = 64
_DUPLICATE_COSINE = 0.95


@dataclass(frozen=True)
class ProjectionConfig(Config):
    """`reference` is what the authors' code does; the defaults are ours."""

    form: str = setting(
        "update",
        "update: the optimizer's change is projected, so protected text is kept exactly. reference: only "
        "gradients are projected, and the optimizer undoes part of it.",
        choices=("update", "reference"),
    )
    rows: str = setting(
        "mean",
        "Tokens of a prompt to protect: the mean of the concept's, the last, all content tokens, or every "
        "position.",
        choices=ROWS,
    )
    protect_previous: bool = setting(True, "Also protect earlier targets, so that they stay forgotten.")
    decoys: int = setting(
        0,
        "Number of made-up names that stand for all names nobody listed. Changes of the model's response to "
        "them, in the anchor prompts, are damped. 0: no damping.",
        minimum=0,
        maximum=10_000,
    )
    damping: float = setting(
        1e-5,
        "Share of the text's energy at which a direction is damped by half: how strongly unlisted names are "
        "protected. Smaller protects more and forgets a little less.",
        minimum=1e-12,
    )
    auxiliary: str = setting(
        "none",
        "List of a hundred further names to keep. auto: all lists that suit the target. Names that would "
        "leave too little of the target to forget are left out.",
        choices=("none", "auto", *LISTS),
        added_later=True,
    )
    auxiliary_names: str = setting(
        "",
        "Further names to keep, separated by commas or line breaks; put the kind before a name of another "
        "kind than the target, such as object: cat.",
        added_later=True,
    )
    REFERENCE: ClassVar[dict] = {"form": "reference", "rows": "last"}

    def __post_init__(self):
        super().__post_init__()
        parse_names(self.auxiliary_names)


def distinct_columns(columns: Tensor, cosine: float = _DUPLICATE_COSINE) -> Tensor:
    """The rows of (n, d) that the reference's greedy filter keeps: (m, d), in order.

    A row is kept if its cosine with every row kept before is below `cosine`.
    """
    units, kept = torch.empty_like(columns), []
    for number, row in enumerate(columns):
        unit = row / row.norm().clamp_min(1e-12)
        if not kept or (units[: len(kept)] @ unit).max() < cosine:
            units[len(kept)] = unit
            kept.append(number)
    return columns[kept]


def regularized_projector(rows: Tensor) -> Tensor:
    """The reference's P = I - C (C^T C + rho I)^-1 C^T, (d, d) in fp32, for columns C = rows^T.

    With rho > 0, P is only approximately a projector.
    """
    columns = distinct_columns(rows).T.float()
    gram = columns.T @ columns
    rho = max(1e-4, 1e-6 * gram.trace().item() / len(gram))
    inner = torch.linalg.solve(gram + rho * torch.eye(len(gram)), columns.T)
    return torch.eye(len(columns)) - columns @ inner


@REGULARIZERS.register(
    "projection",
    config=ProjectionConfig,
    display_name="Gradient Projection",
    description="Keeps the model's response to the text of the concepts to keep, by projecting changes of "
    "the weights.",
    paper="Continual Unlearning for Text-to-Image Diffusion Models: A Regularization Perspective, ICLR "
    "2026, arXiv 2511.07970",
)
class GradientProjection(Regularizer):
    """Projection of the change D of each K/V matrix, D (I - Q Q^T): W c stays the same for protected text c.

    Q is an orthonormal basis of the protected text vectors (concepts to keep, earlier targets). Cosines and
    energies are taken after subtracting the mean vector of made-up names, because all names share most of
    their vector. A concept to keep within a cosine of 0.9 of a target is left out. The energy left of target
    c_t is ||P (c_t - mean)|| / ||c_t - mean||.

    Auxiliary names are protected too: all typed names, then names of a list, in its order, as long as each
    target keeps 0.4 of its energy; a list thus never makes a step fail. Also left out are names that contain
    a target's name, as in the paper's code, and, for a family with a closed vocabulary, listed names with
    unknown words. For damping, an auxiliary name replaces the target in an anchor prompt; a name whose kind
    cannot replace it uses its bare prompt.

    With decoys, the matrices are also trained in damped coordinates: gradient G S^1/2, change D S^1/2, with
    S = g (I + M / damping)^-1. M is the mean of second moments of token vectors, each scaled to trace 1: of
    decoys, concepts to keep, earlier targets, anchors, and auxiliary names. The gain g restores the response
    of the target's own text to its size without damping.

    With a mask, the change becomes ((D B) * mask) B^T, B an orthonormal basis of the complement of Q
    (`Subspace.allowed`): exactly orthogonal to the protected vectors and exactly sparse in B. With decoys as
    well, the mask acts on D S^1/2. Orthogonality and sparsity stay exact, but the masked change is no longer
    of the form D S^1/2, so damping is not exact. B then diagonalizes M within the complement, so a mask never
    raises the change's mean square response to the damped text, sum_j (B^T M B)_jj |A_j|^2. The form
    `reference` limits no subspace; masks then act on the matrix entries.

    Raises:
        ConceptError: there is nothing to protect, this part and all others together would leave less than
            0.2 of a target's vector, or the family knows none of the auxiliary names.
    """

    config: ProjectionConfig
    needs = ("text_readers",)
    draws_made_up_names = True

    def prepare(self, context: StepContext) -> None:
        network, self._readers = context.network, context.text_readers
        made_up = decoy_concepts(network, context.concepts, _CENTRE_NAMES, context.generator("centre"))
        centre = torch.stack([target_vector(network, concept) for concept in made_up]).mean(0)
        targets = torch.stack([target_vector(network, concept) for concept in context.concepts]) - centre
        names = {concept.name.lower() for concept in context.concepts}
        retained = [
            concept
            for concept in (*context.retain, *(context.previous if self.config.protect_previous else ()))
            if concept.name.lower() not in names
        ]
        retained = [
            concept
            for concept in retained
            if _cosine(target_vector(network, concept) - centre, targets).max() <= _NEAR_TARGET_COSINE
        ]
        auxiliary, self._report = self._auxiliary(context, retained, centre, targets)
        retained += auxiliary
        if not retained and not self.config.decoys:
            raise ConceptError(
                "Gradient projection has nothing to protect: the keep list is empty, or all of it says the "
                "same as the target; name other concepts to keep, or set auxiliary or decoys."
            )
        self._projector = self._damper = self._subspace = protected = moment = None
        device, left, in_update = network.device, targets, self.config.form == "update"
        if retained:
            rows = torch.cat([self._rows(network, concept) for concept in retained])
            if in_update:
                protected = orthonormal_basis(rows)
                left = targets - targets @ protected @ protected.T
            else:
                projector = regularized_projector(rows)
                self._projector, left = projector.to(device), targets @ projector.double()
        self._concepts, self._targets = context.concepts, targets
        self._check_left(left, 0 if protected is None else protected.shape[1])
        if self.config.decoys:
            moment, damper = self._damped(context, retained, auxiliary)
            self._damper = damper.float().to(device)
        if in_update:
            self._subspace = Subspace(targets.shape[1], protected, moment)

    def prepare_mask(self, context: StepContext, allowed_subspace: Callable[[str], Tensor | None]) -> None:
        """Checks what is left of the targets once more where other parts protect further directions."""
        if self._subspace is None or not (readers := self._readers & context.start.keys()):
            return
        free, own = allowed_subspace(min(readers)), self._subspace.protected
        if free.shape[1] < self._subspace.width - (0 if own is None else own.shape[1]):
            free = free.cpu().double()
            self._check_left(self._targets @ free, len(free) - free.shape[1])

    def _check_left(self, left: Tensor, rank: int) -> None:
        """Notes and checks what `rank` protected directions leave of the targets' vectors."""
        shares = _shares(left, self._targets)
        self._report |= {"protected_rank": rank, "target_energy_left": shares.min().item()}
        for concept, share in zip(self._concepts, shares.tolist(), strict=True):
            if share < LEAST_TARGET_ENERGY:
                raise ConceptError(
                    f"Only {share:.2f} of {concept.target!r} would be left to forget (at least "
                    f"{LEAST_TARGET_ENERGY} is needed), because the concepts to keep say nearly the same; "
                    "remove those closest to it."
                )

    def _rows(self, network: Network, concept: Concept) -> Tensor:
        return prompt_rows(network, [concept.prompt], self.config.rows, concept.name)

    def _auxiliary(
        self, context: StepContext, retained: list[Concept], centre: Tensor, targets: Tensor
    ) -> tuple[list[Concept], dict[str, float]]:
        """(auxiliary concepts to protect beside `retained`, numbers of protected, excluded and unknown)."""
        network = context.network
        typed = parse_names(self.config.auxiliary_names, context.concepts[0].kind)
        listed = listed_names(self.config.auxiliary, [concept.kind for concept in context.concepts])
        if not typed and not listed:
            return [], {}
        known = [
            concept
            for concept in listed
            if not network.family.closed_vocabulary
            or network.token_count(concept.name) == len(concept.name.split())
        ]
        if listed and not known:
            raise ConceptError(
                f"{network.family.display_name} knows none of the names that auxiliary "
                f"{self.config.auxiliary!r} would keep; choose another list, or type names it knows as "
                "auxiliary_names."
            )
        network.encode([concept.prompt for concept in (*typed, *known)])  # many at a time
        basis = orthonormal_basis(
            torch.cat([targets[:0], *(self._rows(network, concept) for concept in retained)])
        )
        protected, prompts, excluded = [], {concept.prompt.lower() for concept in retained}, 0
        for number, concept in enumerate((*typed, *known)):
            if concept.prompt.lower() in prompts:
                continue
            prompts.add(concept.prompt.lower())
            rows = self._rows(network, concept)
            fresh = rows - rows @ basis @ basis.T
            wider = (
                torch.cat([basis, orthonormal_basis(fresh)], dim=1)
                if fresh.norm() > 1e-6 * rows.norm()
                else basis
            )
            takes_too_much = (
                number >= len(typed)
                and _shares(targets - targets @ wider @ wider.T, targets).min() < _LEAST_BESIDE_LISTS
            )
            is_near = _cosine(target_vector(network, concept) - centre, targets).max() > _NEAR_TARGET_COSINE
            if (
                takes_too_much
                or is_near
                or any(target.mentioned_in(concept.name) for target in context.concepts)
            ):
                excluded += 1
            else:
                protected, basis = [*protected, concept], wider
        return protected, {
            "auxiliary_protected": len(protected),
            "auxiliary_excluded": excluded,
            "auxiliary_unknown": len(listed) - len(known),
        }

    def _damped(
        self, context: StepContext, retained: list[Concept], auxiliary: list[Concept]
    ) -> tuple[Tensor, Tensor]:
        """(M, S^1/2) of the class docstring, each (d, d) in fp64."""
        generator = context.generator("decoys")
        decoys = decoy_concepts(context.network, context.concepts, self.config.decoys, generator)
        anchor = display_name(context.concepts[0].anchor)

        def moment(prompts: list[str]) -> Tensor:
            rows = prompt_rows(context.network, prompts, "all")
            return rows.T @ rows / rows.square().sum()

        def sentences(concepts: Sequence[Concept], count: int) -> list[str]:
            prompts = []
            for concept in concepts:
                anchors = torch.randint(len(context.anchor_prompts), (count,), generator=generator).tolist()
                placed = concept.in_the_place_of(anchor)
                prompts += [
                    prompt for i in anchors for prompt in placed.target_prompts(context.anchor_prompts[i])
                ]
            return prompts

        previous = [concept for concept in retained if concept in context.previous]
        declared = [concept for concept in retained if concept not in (*context.previous, *auxiliary)]
        groups = [
            sentences(decoys, 1),
            sentences(declared, 8),
            sentences(previous, 8),
            sorted(set(context.anchor_prompts)),
            [prompt for concept in auxiliary for prompt in sentences([concept], 1) or [concept.prompt]],
        ]
        moments = [moment(prompts) for prompts in groups if prompts]
        mean = sum(moments) / len(moments)
        values, vectors = torch.linalg.eigh(mean)
        gains = 1 / (1 + values.clamp_min(0) / self.config.damping)
        target_moment = moment(sentences(context.concepts, 8))
        gains /= (gains * (vectors.T @ target_moment @ vectors).diagonal()).sum()
        return mean, vectors @ torch.diag(gains.sqrt()) @ vectors.T

    @property
    def acts_on_closed_form(self) -> bool:
        return self.config.form == "update"

    def subspace(self, name: str) -> Subspace | None:
        return self._subspace if name in self._readers else None

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        for matrix in (self._projector, self._damper):
            if matrix is not None and name in self._readers:
                gradient = gradient @ matrix
        return gradient

    def constrain(self, name: str, change: Tensor) -> Tensor:
        return change if self._damper is None or name not in self._readers else change @ self._damper

    def report(self) -> dict[str, float]:
        return self._report


def _shares(left: Tensor, targets: Tensor) -> Tensor:
    """Norm of each row left (n, d) relative to its target (n, d): (n,)."""
    return left.norm(dim=1) / targets.norm(dim=1)


def _cosine(vector: Tensor, others: Tensor) -> Tensor:
    """Cosines (n,) of a vector (d,) with rows (n, d)."""
    return torch.nn.functional.normalize(others, dim=1) @ torch.nn.functional.normalize(vector, dim=0)
