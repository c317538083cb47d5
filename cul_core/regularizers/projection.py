"""Gradient projection: forbid changes of the key and value matrices that act on the text of what must stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..concepts import Concept
from ..conditioning import ROWS, decoy_concepts, prompt_rows, target_vector
from ..config import Config, setting
from ..errors import ConceptError
from ..methods.base import StepContext
from ..params import is_kv
from .base import REGULARIZERS, Regularizer

LEAST_TARGET_ENERGY = 0.2
_NEAR_TARGET_COSINE = 0.9
_DUPLICATE_COSINE = 0.95


@dataclass(frozen=True)
class ProjectionConfig(Config):
    """`reference` is what the authors' code does; the defaults are ours."""

    form: str = setting("update", "update: the change the optimizer made is projected, so protected text is kept exactly. "
                        "reference: gradients are, and the optimizer undoes part of it.", choices=("update", "reference"))  # fmt: skip
    rows: str = setting("mean", "Which tokens of a kept prompt are protected: the mean of the concept's, the last, all content "
                        "tokens, or every position.", choices=ROWS)  # fmt: skip
    protect_previous: bool = setting(True, "Also keep what earlier steps of the chain made of their targets.")
    decoys: int = setting(0, "Made-up names whose effect is damped too, in the sentences that are trained: they stand for "
                          "everything that nobody listed.", minimum=0)  # fmt: skip
    damping: float = setting(0.01, "Changes are divided by 1 + (share of the decoys' energy in that direction) / damping; "
                             "smaller protects more.", minimum=1e-8)  # fmt: skip
    REFERENCE: ClassVar[dict] = {"form": "reference", "rows": "last"}


def distinct_columns(columns: Tensor, cosine: float = _DUPLICATE_COSINE) -> Tensor:
    """The rows of (n, d) kept by the reference's greedy filter: in order, if the cosine with every kept one is below `cosine`."""
    kept: list[Tensor] = []
    for row in columns:
        unit = row / row.norm().clamp_min(1e-12)
        if not kept or (torch.stack(kept) @ unit).max() < cosine:
            kept.append(unit)
    norms = columns.norm(dim=1)
    unit_rows = columns / norms[:, None].clamp_min(1e-12)
    keep = [int((unit_rows @ unit).argmax()) for unit in kept]
    return columns[sorted(set(keep))]


def orthonormal_basis(rows: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormal basis (d, r) of the span of (n, d) rows, by SVD in fp64; singular values under tolerance x the largest drop out."""
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return right[values > tolerance * values[0]].T


def regularized_projector(rows: Tensor) -> Tensor:
    """The reference's P = I - C (C^T C + rho I)^-1 C^T, (d, d) in fp32, for columns C = rows^T; only approximately a projector."""
    columns = distinct_columns(rows).T.float()
    gram = columns.T @ columns
    rho = max(1e-4, 1e-6 * gram.trace().item() / len(gram))
    inner = torch.linalg.solve(gram + rho * torch.eye(len(gram)), columns.T)
    return torch.eye(len(columns)) - columns @ inner


@REGULARIZERS.register(
    "projection",
    config=ProjectionConfig,
    display_name="Gradient Projection",
    description="Keeps what the model makes of the concepts to be kept, by forbidding changes that act on their text.",
    paper="Continual Unlearning for Text-to-Image Diffusion Models: A Regularization Perspective, ICLR 2026, arXiv 2511.07970",
    families=("mini",),
    groups=("kv", "attn2", "attn", "full"),
)
class GradientProjection(Regularizer):
    """W c stays the same for every protected text vector c: the change D of each K/V matrix becomes D (I - Q Q^T).

    Q is an orthonormal basis of the protected vectors (kept concepts, earlier targets), without those within a cosine of 0.9 of
    a target. With decoys, D is also multiplied by (I + M / damping)^-1, M their covariance with trace 1.

    Raises:
        ConceptError: nothing to protect, or less than 0.2 of a target's vector would be left.
    """

    config: ProjectionConfig

    def prepare(self, context: StepContext) -> None:
        targets = torch.stack([target_vector(context.bundle, concept) for concept in context.concepts])
        rows = self._protected_rows(context, targets)
        damped = self.config.decoys > 0
        if not len(rows) and not damped:
            raise ConceptError("Gradient projection has nothing to protect: the keep list is empty; name concepts to keep, or set decoys.")
        self._projector = self._basis = self._damper = None
        if len(rows) and self.config.form == "reference":
            self._projector = regularized_projector(rows).to(rows.device)
            left = (targets @ self._projector.double()).norm(dim=1) / targets.norm(dim=1)
        else:
            self._basis = orthonormal_basis(rows) if len(rows) else rows.T
            left = (targets - targets @ self._basis @ self._basis.T).norm(dim=1) / targets.norm(dim=1)
        self._report = {"protected_rank": 0 if self._basis is None else self._basis.shape[1], "target_energy_left": left.min().item()}
        for concept, share in zip(context.concepts, left.tolist(), strict=True):
            if share < LEAST_TARGET_ENERGY:
                raise ConceptError(f"Only {share:.2f} of {concept.target!r} would be left to forget (at least {LEAST_TARGET_ENERGY} is "
                                   "needed), because the concepts to keep say nearly the same; remove those closest to it.")  # fmt: skip
        if self._basis is not None:
            self._basis = self._basis.float()
        if damped:
            self._damper = self._decoy_damper(context).float()

    def _protected_rows(self, context: StepContext, targets: Tensor) -> Tensor:
        kept = [*context.retain, *(context.previous if self.config.protect_previous else ())]
        kept = [concept for concept in kept if concept.name.lower() not in {c.name.lower() for c in context.concepts}]
        parts = [prompt_rows(context.bundle, [concept.prompt], self.config.rows, concept.name) for concept in kept]
        if not parts:
            return targets.new_zeros(0, targets.shape[1])
        rows = torch.cat(parts)
        cosine = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(targets, dim=1).T
        return rows[cosine.max(1).values <= _NEAR_TARGET_COSINE]

    def _decoy_damper(self, context: StepContext) -> Tensor:
        generator = context.generator("decoys")
        decoys = decoy_concepts(context.bundle, context.concepts, self.config.decoys, generator)
        prompts = [self._sentence(concept, context.anchor_prompts, generator) for concept in (*decoys, *context.retain)]
        rows = prompt_rows(context.bundle, [p for p in prompts if p] + list(context.anchor_prompts), "all")
        covariance = rows.T @ rows
        covariance /= covariance.trace()
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return torch.linalg.inv(identity + covariance / self.config.damping)

    @staticmethod
    def _sentence(concept: Concept, anchor_prompts: tuple[str, ...], generator: torch.Generator) -> str | None:
        anchor = anchor_prompts[int(torch.randint(len(anchor_prompts), (), generator=generator))]
        versions = concept.target_prompts(anchor)
        return versions[int(torch.randint(len(versions), (), generator=generator))] if versions else None

    def transform_gradient(self, name: str, gradient: Tensor) -> Tensor:
        return gradient @ self._projector if self._projector is not None and is_kv(name) else gradient

    def constrain(self, name: str, change: Tensor, mask: Tensor | None) -> Tensor | None:
        if not is_kv(name) or (self._basis is None and self._damper is None):
            return None
        if mask is not None:
            change = change * mask
        change = self._off_basis(change)
        return change if self._damper is None else self._off_basis(change @ self._damper)

    def _off_basis(self, change: Tensor) -> Tensor:
        return change if self._basis is None else change - (change @ self._basis) @ self._basis.T

    def report(self) -> dict[str, float]:
        return self._report
