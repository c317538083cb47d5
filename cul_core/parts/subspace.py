"""Protected text directions: what parts forbid matrices to act on, joined exactly, in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def orthonormal_basis(rows: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormal basis (d, r) of the span of (n, d) rows, by SVD in fp64; singular values under tolerance x
    the largest drop out."""
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return right[values > tolerance * values[:1]].T


def complement_basis(basis: Tensor) -> Tensor:
    """Orthonormal basis (d, d - r) of what is orthogonal to the r orthonormal columns of (d, r), in fp64.

    It completes a QR decomposition by r reflections, so that its vectors are axes with a correction of rank
    r: what is sparse in it is nearly so in the axes.
    """
    return torch.linalg.qr(basis.double(), mode="complete").Q[:, basis.shape[1] :]


@dataclass(frozen=True, eq=False)
class Subspace:
    """Text directions that a matrix must not act on, and what is only damped.

    Args:
        width: d, the width of the text rows.
        protected: orthonormal basis (d, r) of the directions; None where none is forbidden.
        moment: (d, d) second moment of text whose response is damped; None for none.
    """

    width: int
    protected: Tensor | None = None
    moment: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Subspace]) -> Subspace:
        """The union of what several protect, exactly, and the sum of what they damp; a single one is
        itself."""
        if len(parts) == 1:
            return parts[0]
        bases = [part.protected.T for part in parts if part.protected is not None]
        moments = [part.moment for part in parts if part.moment is not None]
        return cls(
            parts[0].width,
            orthonormal_basis(torch.cat(bases)) if bases else None,
            sum(moments) if moments else None,
        )

    @cached_property
    def allowed(self) -> Tensor:
        """Orthonormal basis B (d, m) of the other directions. With a moment M it diagonalizes B^T M B, so
        that a mask of coordinates never raises the mean square response to the damped text."""
        if self.protected is None:
            free = torch.eye(self.width, dtype=torch.float64)
        else:
            free = complement_basis(self.protected)
        if self.moment is None:
            return free
        return free @ torch.linalg.eigh(free.T @ self.moment @ free).eigenvectors
